"""The results of a check as Markdown. Only the standard library."""

import math


def summary(record):
    """A part's line."""
    rows, wrong = record["rows"], [row for row in record["rows"] if row.get("ok") is False]
    words = f"{record['name']}: {record['state']}, {record['seconds']:.0f} s, {len(rows)} results"
    return words + (f", {len(wrong)} of them wrong" if wrong else "")


def render(results):
    """The whole table; `results` is what results.json holds."""
    parts = results["parts"]
    rows = {part["name"]: part["rows"] for part in parts}
    lines = heading(results, named(rows.get("machine", ())))
    lines += ["| part | | seconds | results | wrong |", "|---|---|---|---|---|"]
    for part in parts:
        wrong = sum(row.get("ok") is False for row in part["rows"])
        lines.append(
            f"| {part['name']} | {part['state']} | {part['seconds']:.0f} | {len(part['rows'])} | "
            f"{wrong or ''} |"
        )
    lines += ["", *trouble(parts), *differences(parts), *facts(rows.get("commands", ()))]
    machine, speed = named(rows.get("machine", ())), of_speed(rows)
    return "\n".join([*lines, *steps(speed, machine), *generation(speed), *profile(speed)]) + "\n"


def named(rows):
    return {row["name"]: row for row in rows}


def of_speed(rows):
    prefix = "speed of "
    return [row for part, own in rows.items() if part.startswith(prefix) for row in own]


def heading(results, machine):
    dry = (
        "DRY RUN on the CPU, tiny shapes: no figure means anything. " if results["dry_run"] else ""
    )
    one = machine.get("machine", {})
    packages = one.get("packages", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines = [
        f"## {results['date']}: `{results['command']}`, {one.get('device', 'no device')}",
        f"{dry}Commit {results['commit']}. Python {one.get('python', '?')}, {versions}.",
        "",
    ]
    if "copies" in machine:
        lines += [
            f"Measured there: products {machine['products']['flops'] / 1e12:.1f} TFLOP/s "
            f"(bfloat16, {machine['products']['size']:,} cubed), copies "
            f"{machine['copies']['bytes_per_second'] / 1e12:.2f} TB/s.",
            "",
        ]
    if results["missing"]:
        lines += [f"Packages that were missing: {', '.join(results['missing'])}.", ""]
    return lines


def trouble(parts):
    """What went wrong, and what was left out."""
    lines, skipped = [], {}
    for part in parts:
        for row in part["rows"]:
            if row.get("ok") is False:
                said = {key: value for key, value in row.items() if key not in ("name", "ok")}
                lines.append(f"- WRONG, {part['name']}: {row['name']}: {said}")
            elif "skipped" in row:
                name = row["name"].rpartition("::")[2].partition("[")[0]
                skipped.setdefault((part["name"], row["skipped"]), {})[name] = None
        if part["state"] not in ("passed", "failed", "running", "not reached"):
            last = [line for line in part["log"].splitlines() if line.strip()][-1:]
            lines.append(f"- {part['name']} {part['state']}: {''.join(last)[:300]}".rstrip(": "))
    for (part, reason), names in skipped.items():
        lines.append(f"- left out, {part}: {', '.join(names)}: {reason}")
    return [*lines, ""] if lines else []


def differences(parts):
    """Of every part that compares, the result nearest to its limit."""
    lines = []
    for part in parts:
        compared = [row for row in part["rows"] if "limit" in row]
        if compared:
            near = max(compared, key=share_of_limit)
            lines.append(
                f"| {part['name']} | {len(compared)} | {near['name']} | {near['difference']:.1e} | "
                f"{near['limit']:.0e} |"
            )
    head = [
        "| compared | results | nearest to its limit | difference | limit |",
        "|---|---|---|---|---|",
    ]
    return [*head, *lines, ""] if lines else []


def share_of_limit(row):
    """What is no number is farther than anything else."""
    share = row["difference"] / row["limit"]
    return math.inf if math.isnan(share) else share


def facts(rows):
    lines = []
    for row in rows:
        said = {key: value for key, value in row.items() if key != "name"}
        said = ", ".join(f"{key} {value}" for key, value in said.items())
        lines.append(f"- {row['name']}: {said[:300]}")
    return [*lines, ""] if lines else []


def steps(rows, machine):
    """LoRA steps; the peers of a case have its name and one word more."""
    trained = [row for row in rows if "frozen" in row]
    if not trained:
        return []
    peak = machine.get("machine", {}).get("peak_flops")
    rate = machine.get("products", {}).get("flops")
    lines = [
        "LoRA r=16 on all linear maps, AdamW; ratios: jaxtune's bfloat16 step of the same batch to "
        "this. MFU: 4 FLOP a frozen and 6 a trained parameter and token, of the data sheet's peak. "
        "Floor: 4 FLOP a frozen parameter and token at the products' rate above.",
        "",
        "| step | tokens/s | ms | MFU | of the floor | memory, GB | speed, memory of jaxtune's |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = {}
    for row in trained:
        model, _, batch = row["name"].partition(", ")
        if model in ("8B", "1B"):
            ours[model, batch] = row
    for row in trained:
        case, _, batch = row["name"].partition(", ")
        seconds, tokens = row["seconds"], row["tokens"]
        mfu = (4 * row["frozen"] + 6 * row["trained"]) * tokens / seconds
        floor = 4 * row["frozen"] * tokens / seconds
        mine = ours.get((case.partition(" ")[0], batch))
        ratio = "" if mine is None or mine is row else (
            f"{seconds / tokens / (mine['seconds'] / mine['tokens']):.2f}x, "
            f"{mine['memory'] / row['memory']:.2f}x"
        )  # fmt: skip
        note = f", remat {row['remat']}" if row.get("remat") else ""
        note += ", checkpointing" if row.get("checkpointing") else ""
        lines.append(
            f"| {row['name']}{note} | {tokens / seconds:,.0f} | {1e3 * seconds:.1f} | "
            f"{f'{mfu / peak:.1%}' if peak else '?'} | {f'{floor / rate:.1%}' if rate else '?'} | "
            f"{'at most ' if row['memory_is_at_most'] else ''}{row['memory'] / 1e9:.2f} | {ratio} |"
        )
    return [*lines, ""]


def generation(rows):
    rates = {}
    for row in rows:
        if row["name"].startswith("generation") and "rows" in row:
            side = row["name"].partition(",")[0]
            rates.setdefault(row["rows"], {})[side] = row["tokens"] / row["seconds"]
    if not rates:
        return []
    lines = ["Greedy generation, new tokens a second", "",
             "| rows | jaxtune | transformers | ratio |", "|---|---|---|---|"]  # fmt: skip
    for count, sides in rates.items():
        ours, theirs = sides.get("generation"), sides.get("generation PEFT")
        ratio = f"{ours / theirs:.2f}x" if ours and theirs else ""
        words = [f"{value:,.0f}" if value else "?" for value in (ours, theirs)]
        lines.append(f"| {count} | {' | '.join(words)} | {ratio} |")
    return [*lines, ""]


def profile(rows):
    kinds = [row for row in rows if "profile" in row]
    if not kinds:
        return []
    whole = sum(row["ms"] for row in kinds)
    case = kinds[0]["name"].partition(",")[0]
    lines = [f"Where {case}'s step goes, {whole:.1f} ms on the device: "
             + ", ".join(f"{row['profile']} {row['ms']:.1f}" for row in kinds) + ".",
             "", "| operation | kind | ms a step | runs |", "|---|---|---|---|"]  # fmt: skip
    for row in rows:
        if "operation" in row:
            name = row["name"].partition(", ")[2]
            lines.append(f"| {name} | {row['operation']} | {row['ms']:.2f} | {row['times']} |")
    return [*lines, ""]
