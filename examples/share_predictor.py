"""A predictor is saved with its card, enabled from the folder alone, and refused on a schedule that is not its own."""

import tempfile
from pathlib import Path

import lesa
from lesa.demo.model import WEIGHTS, load_pipeline, sample

pipeline = load_pipeline()
seeds, labels = range(8), [0, 1, 2, 3, 4, 5, 6, 7]
reference = sample(pipeline, labels, seeds)

predictor = lesa.LesaPredictor.from_pretrained(WEIGHTS / "lesa-n5")
predictor.plan = lesa.StepPlan.paper(50, interval=5)  # lesa.fit sets it

with lesa.enable(pipeline, predictor):
    error = (sample(pipeline, labels, seeds) - reference).square().mean()
row = {
    "method": "LESA",
    "plan": "paper N=5",
    "full_steps": len(predictor.plan.full_steps),
    "speedup_ideal": predictor.plan.speedup,
    "psnr": float(10 * (4 / error).log10()),  # pixels from -1 to 1
    "samples": len(seeds),
}

with tempfile.TemporaryDirectory() as folder:
    lesa.save(predictor, folder, report=[row])
    # lesa.push_to_hub(predictor, "user/repo", report=[row]) puts the same files into a repository
    print((Path(folder) / "README.md").read_text())
    with lesa.enable(pipeline, folder) as handle:  # or "user/repo"
        sample(pipeline, labels, seeds)
        print(handle.summary())
    try:
        with lesa.enable(pipeline, folder, lesa.StepPlan.paper(28, interval=5)):
            sample(pipeline, labels, seeds, num_steps=28)
    except ValueError as refusal:
        print(f"\nOn 28 steps: {refusal}.")
