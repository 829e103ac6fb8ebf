"""docs/performance.md: bytes to move, measured times, and the effect of each optimisation."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.report.drawing import COLOURS, figure
from benchmarks.report.registry import part, picture, table
from benchmarks.shapes import SHAPES

DOCUMENT = "docs/performance.md"
BENCH = "pytest benchmarks --condensed benchmarks/results/bench.json"
FLUX = SHAPES["FLUX.1-dev 1024"]
Rows = list[dict[str, Any]]


@part(DOCUMENT, "byte counts", None, command=None)
def byte_counts(_: Any) -> str:
    """The bytes that an interval of six predicted steps moves, for each implementation."""
    headings = ["feature", "size", "eager, step by step", "one pass a step", "one pass an interval", "with the head"]
    rows = []
    for shape in SHAPES.values():
        m, p, size = shape.kept, shape.coming, shape.nbytes
        outputs = p * size * shape.outputs // shape.channels
        moved = [(3 * m + 6) * p * size, (m + 1) * p * size, (m + p) * size, m * size + outputs]
        rows.append([shape.name, amount(size), *map(amount, moved)])
    return table(headings, rows)


@part(DOCUMENT, "intensity", None, command=None)
def intensity(_: Any) -> str:
    """Operations per byte of each function."""
    rows = []
    for name in ("FLUX.1-dev 1024", "Wan 14B 720p", "DiT-XL/2 256"):
        shape = SHAPES[name]
        m, p, item = shape.kept, shape.coming, shape.dtype.itemsize
        one = 2 * m / ((m + 1) * item)
        several = 2 * m * p / ((m + p) * item)
        products = p * (2 * m + 8 + 2 * shape.outputs) / (m * item + p * shape.outputs / shape.channels * item)
        rows.append([name, f"{one:.1f}", f"{several:.1f}", f"{products:.0f}", f"{2 / (2 * item):.2f}"])
    headings = ["operations a byte", "combine, 1 of 8", "combine, 6 of 8", "head, 6 of 8", "gram_row"]
    return table(headings, rows)


@part(DOCUMENT, "kernels", "bench.json", command=BENCH)
def kernels(measured: Any) -> str:
    """Every group that includes a copy of the same bytes."""
    rows = []
    for group, entries in groups(measured["rows"]).items():
        operation, _, shape = group.split("/", 2)
        if "copy" not in entries or operation.startswith("kan"):
            continue
        for provider, row in entries.items():
            share = entries["copy"]["median"] / row["median"]
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            cells = [operation, shape, provider, ms(row["median"]), f"{row['gb_per_s']:.1f} GB/s", f"{share:.0%}"]
            rows.append([*cells, error])
    headings = ["function", "feature", "provider", "time", "rate", "of a copy", "error"]
    return table(headings, rows, left=3)


@part(DOCUMENT, "compiler", "bench.json", command=None)
def compiler(measured: Any) -> str:
    """Where the compiled reference is faster."""
    ratios: dict[str, float] = {}
    for group, entries in groups(measured["rows"]).items():
        if {"ours", "compiled reference"} <= entries.keys():
            ratios[group] = entries["compiled reference"]["median"] / entries["ours"]["median"]
    ahead = [group for group, ratio in ratios.items() if ratio < 1]
    least, most = min(ratios, key=lambda g: ratios[g]), max(ratios, key=lambda g: ratios[g])
    return (
        f"On this CPU `torch.compile` of the plain reference is faster than ours in {len(ahead)} of {len(ratios)} "
        f"groups: it takes from {ratios[least]:.2f} of our time ({least}) to {ratios[most]:.2f} ({most})."
    )


@part(DOCUMENT, "intervals", "bench.json", command=BENCH)
def intervals(measured: Any) -> str:
    """A predicted step, an interval, gradients and KAN layers: ours compared with the others."""
    rows = []
    for group, entries in groups(measured["rows"]).items():
        operation, direction, shape = group.split("/", 2)
        if ("copy" in entries and not operation.startswith("kan")) or "ours" not in entries:
            continue
        ours = entries["ours"]["median"]
        for provider, row in entries.items():
            cells = [f"{operation}, {direction}", shape, provider, ms(row["median"]), f"{row['median'] / ours:.2f}"]
            rows.append([*cells, str(row.get("operators", "")), amount(row.get("peak_bytes", 0))])
    headings = ["what", "shape", "provider", "time", "over ours", "operators", "peak memory"]
    return table(headings, rows, left=3)


@part(DOCUMENT, "once", "bench.json", command=BENCH)
def once(measured: Any) -> str:
    """Work that is done once, and whole denoising loops."""
    rows = []
    for group, entries in groups(measured["rows"]).items():
        kind, what, size = group.split("/", 2)
        if kind in ("calibration", "training", "loop"):
            for provider, row in entries.items():
                rows.append([kind, what, size, "" if provider == "None" else provider, ms(row["median"])])
    return table(["kind", "what", "size", "by", "time"], rows, left=4)


@part(
    DOCUMENT,
    "optimisations",
    "optimisations.json",
    command="python -m benchmarks.optimisations --out benchmarks/results/optimisations.json",
)
def optimisations(measured: Any) -> str:
    """From the released implementation to ours."""
    rows = [
        [
            row["shape"],
            row["dtype"],
            row["way"].replace("ours", "one head an interval"),
            ms(row["seconds"]),
            f"{row['speedup']:.1f}x",
            str(row["operators"]),
            amount(row["allocated"]),
            f"{row['error']:.1e}",
        ]
        for row in measured["rows"]
    ]
    return table(["feature", "dtype", "way", "time", "", "operators", "allocated", "error"], rows, left=3)


SCALING = "python -m benchmarks.scaling --out benchmarks/results/scaling.json"


@part(DOCUMENT, "scaling", "scaling.json", command=SCALING)
def scaling(measured: Any) -> str:
    """The fitted exponent of each curve."""
    rows = [
        [
            row["what"],
            row["over"],
            f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}",
            f"{ms(row['seconds'][0])} to {ms(row['seconds'][-1])}",
            f"{row['exponent']:.2f}",
        ]
        for row in measured["curves"]
    ]
    return table(["cost of", "over", "sizes", "time", "exponent"], rows, left=2)


@picture("docs/images/bandwidth.svg", "bench.json")
def bandwidth(measured: Any) -> Figure:
    """Bars in percent of the rate of a copy of the same bytes."""
    wanted = [f"combine, 1 of {FLUX.kept}", f"combine, {FLUX.coming} of {FLUX.kept}", "Taylor 2"]
    wanted += [f"head, {FLUX.coming} of {FLUX.kept}", f"gram_row of {FLUX.kept}"]
    chosen = {
        group.split("/")[0]: entries
        for group, entries in groups(measured["rows"]).items()
        if group.split("/")[0] in wanted and "FLUX" in group and "backward" not in group
    }
    drawn, (axes,) = figure(width=8, height=3.6)
    providers = list(dict.fromkeys(p for entries in chosen.values() for p in entries if p != "copy"))
    width = 0.8 / max(len(entries) - 1 for entries in chosen.values())
    for colour, provider in zip(COLOURS, providers, strict=False):
        left, heights = [], []
        for x, entries in enumerate(chosen.values()):
            present = [p for p in providers if p in entries]
            if provider in entries:
                left.append(x + (present.index(provider) - (len(present) - 1) / 2) * width)
                heights.append(entries["copy"]["median"] / entries[provider]["median"] * 100)
        axes.bar(left, heights, width * 0.9, label=provider, color=colour)
    axes.axhline(100, color="0.3", linewidth=1, linestyle="--")
    axes.text(len(chosen) - 0.55, 101, "a copy of the same bytes", fontsize=8, color="0.3", ha="right")
    axes.set_ylim(0, 135)
    axes.set_xticks(range(len(chosen)), list(chosen))
    axes.set_ylabel("rate, % of a copy")
    axes.legend(ncols=3, fontsize=8)
    axes.grid(axis="x", visible=False)
    return drawn


@picture("docs/images/ideal.svg", "demo_loop.json")
def ideal(rows: Rows) -> Figure:
    """The speed-up of the denoising loop and its ideal value."""
    batches = sorted({row["batch"] for row in rows}, reverse=True)
    drawn, axes = figure(len(batches), width=8, height=2.6, sharey=True)
    for place, (axis, batch) in enumerate(zip(axes, batches, strict=True)):
        chosen = [row for row in rows if row["batch"] == batch][::-1]
        axis.barh([row["method"] for row in chosen], [row["speedup_loop"] for row in chosen], color=COLOURS[place])
        axis.axvline(chosen[0]["ideal"], color="0.3", linewidth=1, linestyle="--")
        axis.set_title(f"batch {batch}, ideal {chosen[0]['ideal']:.2f}x", fontsize=9)
        axis.set_xlabel("speed-up of the denoising loop")
        axis.grid(axis="y", visible=False)
    return drawn


# Line styles by the first words of a plan's name: circles for the paper's, squares for calibrated, crosses for others.
KINDS = {("paper",): "o-", ("calibrated",): "s--", ("even", "TaylorSeer"): "x"}


@picture("docs/images/quality.svg", "demo.json")
def quality(rows: Rows) -> Figure:
    """Quality over speed for every forecaster, on the paper's plans, on calibrated plans and on others."""
    drawn, (axis,) = figure(width=7, height=4.6)
    chosen = [row for row in rows if row["psnr"] is not None and "KAN" not in row["method"]]
    for place, method in enumerate(dict.fromkeys(row["method"] for row in chosen)):
        mine = [row for row in chosen if row["method"] == method]
        colour, label = COLOURS[place % len(COLOURS)], method
        for kinds, style in KINDS.items():
            points = sorted((row["speedup_wall"], row["psnr"]) for row in mine if row["plan"].startswith(kinds))
            if points:
                axis.plot(*zip(*points, strict=True), style, lw=1, color=colour, label=label)
                label = None  # one entry for each method
    axis.set_xlabel("speed-up of the denoising loop, wall clock")
    axis.set_ylabel("PSNR against the full sampler, dB")
    axis.legend(fontsize=7, ncols=2)
    return drawn


@picture("docs/images/memory.svg", "demo.json")
def memory(rows: Rows) -> Figure:
    """The number of features that each forecaster keeps, and their size on FLUX."""
    rows = [row for row in rows if row["plan"].startswith("paper")]
    plans = list(dict.fromkeys(row["plan"] for row in rows))
    one = min(row["kept_bytes"] for row in rows if row["method"] == "reuse")
    methods = [m for m in dict.fromkeys(row["method"] for row in rows if row["kept_bytes"]) if "KAN" not in m]
    drawn, (axis,) = figure(width=7, height=3.2)
    for place, plan in enumerate(plans):
        kept = {row["method"]: row["kept_bytes"] / one for row in rows if row["plan"] == plan and row["kept_bytes"]}
        left = [x + (place - (len(plans) - 1) / 2) * 0.27 for x in range(len(methods))]
        axis.bar(left, [kept[m] for m in methods], 0.25, label=plan, color=COLOURS[place])
    axis.set_xticks(range(len(methods)), methods)
    axis.set_ylabel("features kept")
    per_feature = FLUX.nbytes / 2**20
    right = axis.secondary_yaxis("right", functions=(lambda n: n * per_feature, lambda b: b / per_feature))
    right.set_ylabel(f"MiB on {FLUX.name}")
    axis.legend(fontsize=8)
    axis.grid(axis="x", visible=False)
    return drawn


@picture("docs/images/scaling.svg", "scaling.json")
def growth(measured: Any) -> Figure:
    """Time over size, with the fitted exponents."""
    over = list(dict.fromkeys(row["over"] for row in measured["curves"]))
    drawn, axes = figure(len(over), width=11, height=3.2)
    for axis, name in zip(axes, over, strict=True):
        for place, row in enumerate(r for r in measured["curves"] if r["over"] == name):
            label = f"{row['what']}: {row['exponent']:.2f}"
            axis.loglog(row["sizes"], [s * 1e3 for s in row["seconds"]], marker="o", markersize=3, label=label)
            axis.lines[-1].set_color(COLOURS[place])
        axis.set_xlabel(name)
        if name == "steps":  # less than two decades, so minor ticks would be labelled
            sizes = measured["curves"][-1]["sizes"]
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.minorticks_off()
        axis.legend(fontsize=7)
        axis.set_ylim(top=axis.get_ylim()[1] * 8)
    axes[0].set_ylabel("milliseconds")
    return drawn


def groups(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of the benchmark suite by group and provider."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        result.setdefault(row["group"], {})[str(row["provider"])] = row
    return result


def amount(nbytes: float) -> str:
    """Bytes with a suitable unit."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def ms(seconds: float) -> str:
    """Milliseconds with three significant digits."""
    return f"{seconds * 1e3:.3g} ms"
