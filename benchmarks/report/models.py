"""Which transformers are supported, and how the caches of diffusers work on them."""

from typing import Any

from benchmarks.report.registry import part, table

SOUND = 1e-3
COMMAND = "make support"
CACHES = ("lesa", "TaylorSeer", "TaylorSeer, lite", "FirstBlockCache", "MagCache")


@part("docs/models.md", "models", "models.json", command=COMMAND)
def models(measured: Any) -> str:
    """A row for each class and each variant of it."""
    rows = measured["models"]
    headings = ["class", "features", "pipelines run end to end", *CACHES]
    return table(
        headings,
        (
            [
                name,
                ", ".join(f"`{head}`" for head in row["heads"]),
                ", ".join(row.get("pipelines", [])),
                *(outcome(row["caches"][cache]) for cache in CACHES),
            ]
            for name, row in sorted(rows.items())
        ),
        left=3,
    )


@part("docs/models.md", "counts", "models.json", command=None)
def counts(measured: Any) -> str:
    """For how many classes each cache skips blocks and leaves a constant feature unchanged."""
    rows = {name: row for name, row in measured["models"].items() if ":" not in name}
    sound = {cache: sum(is_sound(row["caches"][cache]) for row in rows.values()) for cache in CACHES}
    silent = sum(row["caches"]["TaylorSeer"].get("runs") == 1 for row in rows.values())
    wrong = {cache: sum(row["caches"][cache].get("error", 0) > SOUND for row in rows.values()) for cache in CACHES}
    lines = [f"Of {len(rows)} classes, with diffusers {measured['environment']['versions']['diffusers']}:", ""]
    lines += [f"- {cache}: skips blocks of {count}, wrong outputs on {wrong[cache]}" for cache, count in sound.items()]
    return "\n".join([*lines, "", f"TaylorSeer as it comes is enabled on {silent} more, and has no effect there."])


def is_sound(outcome: dict[str, Any]) -> bool:
    """Whether blocks are skipped and a constant feature stays unchanged."""
    return bool(outcome.get("runs", 1) < 1 and outcome["error"] < SOUND)


def outcome(outcome: dict[str, Any]) -> str:
    """One cache on one class: the share of blocks that runs at the cheapest step, or why the cache does not work."""
    if "runs" not in outcome:
        return reason(outcome)
    if outcome["runs"] == 1:
        return "no effect"
    if outcome["error"] > SOUND:
        return f"**wrong** ({outcome['error']:.0%} off)"
    return f"{outcome['runs']:.0%}"


def reason(outcome: dict[str, Any]) -> str:
    """A short reason."""
    if "fails" in outcome:
        return f"{outcome['fails'].split(':')[0]} at run time"
    refused = outcome["refused"]
    return "not registered" if "not registered" in refused else refused.replace("the class takes no cache", "-")
