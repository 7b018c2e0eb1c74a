"""What a part has found, row by row, in the file that ROWS names."""

import json
import os


def add(name, **values):
    """Append a row. `ok=False` says that what it shows is wrong."""
    line = json.dumps({"name": name} | values)
    with open(os.environ["ROWS"], "a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def compare(name, difference, limit, **further):
    """Append a difference and the most that it may be; what is no number is too much."""
    add(name, difference=float(difference), limit=limit, ok=bool(difference <= limit), **further)
