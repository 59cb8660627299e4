"""Symmetries that ``find_symmetries`` finds in the models of torchvision, its time, and a check that they hold.

    python -m benchmarks.detection                          # all 80 classifiers: seconds and shares of parameters
    python -m benchmarks.detection --verify                 # and the largest change of the function, in float64
    python -m benchmarks.detection --kind segmentation      # or video, detection
    python -m benchmarks.detection --kind unseen            # 150 models of other kinds, checked by code of its own

The last reads the list in ``benchmarks/unseen``, which was fixed before the search saw any of its models, and compares outputs,
gradients and buffers with code that does not share the verifier's. Some of the models need diffusers,
segmentation-models-pytorch and torch_geometric; those whose package is missing are passed over and named.

Results are appended to a file, one line of JSON for each model, and models that are there already are passed over: a run that
was interrupted goes on where it was. Weights are random (nothing is downloaded).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

from benchmarks.unseen import CASES
from benchmarks.unseen.check import OUTCOMES, check
from teleport_optim.symmetry import find_symmetries, verify_symmetries

GROUPS = ("permutation", "scaling", "sign", "linear")
UNSEEN_RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
LARGEST_VERIFIED = 3.2e8
"""Parameters above which a model is verified with fewer layers or channels, since float64 copies of it do not fit in 16 GB."""

REDUCED: dict[str, Callable[[], nn.Module]] = {
    "regnet_y_128gf": lambda: models.regnet.RegNet(
        models.regnet.BlockParams.from_init_params(
            depth=27, w_0=48, w_a=20.0, w_m=2.52, group_width=24, se_ratio=0.25
        )
    ),
    "vit_h_14": lambda: models.VisionTransformer(
        image_size=224, patch_size=14, num_layers=4, num_heads=16, hidden_dim=320, mlp_dim=1280
    ),
}  # fmt: skip
"""The same architectures with fewer channels."""

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "resnet50_fpn": lambda: resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5),
    "mobilenet_v3_large_fpn": lambda: mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True),
    "ssd300_vgg16": lambda: models.detection.ssd300_vgg16(weights=None, weights_backbone=None).backbone,
}


def names_of(kind: str) -> list[str]:
    """The models of one kind."""
    modules = {"classification": models, "segmentation": models.segmentation, "video": models.video}
    return sorted(BACKBONES) if kind == "detection" else models.list_models(module=modules[kind])


def make(name: str) -> nn.Module:
    """A model with random weights."""
    if name in BACKBONES:
        return BACKBONES[name]()
    options: dict[str, Any] = {"weights": None}
    if name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model: nn.Module = models.get_model(name, **options)
    return model


def shape_of(name: str, *, is_small: bool) -> tuple[int, ...]:
    """The shape of an input: two examples of the size that the model was made for, or three of one that costs less."""
    batch = 3 if is_small else 2
    if name in models.list_models(module=models.video):
        needs_all = name.startswith(("mvit", "s3d")) or not is_small
        return (batch, 3, 16, 224, 224) if needs_all else (batch, 3, 8, 64, 64)
    if name == "inception_v3":
        return (batch, 3, 299, 299)
    if name == "ssd300_vgg16":
        return (batch, 3, 300, 300)
    if not is_small or name.startswith(("vit", "maxvit")):
        return (batch, 3, 224, 224)
    return (batch, 3, 64, 64) if not name.startswith("convnext") else (batch, 3, 32, 32)


def measure(name: str, *, verify: bool) -> dict[str, Any]:
    """One line of results."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(name)
        start, cpu = time.perf_counter(), time.process_time()
        spec = find_symmetries(model, torch.empty(shape_of(name, is_small=False)))
        result: dict[str, Any] = {
            "model": name,
            "seconds": round(time.perf_counter() - start, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "parameters": sum(map(Tensor.numel, model.parameters())),
            "sites": len(spec),
            "shares": {group: round(spec.of_group(group).share_of(model), 4) for group in GROUPS},
            "refusals": [f"{refusal.name}: {refusal.reason}" for refusal in spec.refusals],
        }
        if verify:
            is_reduced = result["parameters"] > LARGEST_VERIFIED
            shape = shape_of(name, is_small=True)
            if is_reduced:
                model = REDUCED[name]()
                spec = find_symmetries(model, torch.empty(shape))
            report = verify_symmetries(model, spec, torch.randn(shape))
            result |= {"holds": report.ok, "error": report.worst, "failed": list(report.failed), "reduced": is_reduced}
    return result


def check_unseen(names: list[str], output: Path) -> None:
    """Check the models of ``benchmarks.unseen`` that are not in ``output`` yet, and print a summary of all."""
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise SystemExit(f"there are no models {unknown}; they are listed in benchmarks/unseen")
    names = names or list(CASES)
    known = known_results(output)
    packages = {CASES[name].package for name in names} - {""}
    missing = {package for package in packages if importlib.util.find_spec(package) is None}
    for name in names:
        if name not in known and CASES[name].package not in missing:
            known[name] = {"model": name} | check(CASES[name])
            with output.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
            print(f"{name:48} {known[name]['outcome']:8} {known[name].get('cause', '')[:120]}", flush=True)
    rows = [known[name] for name in names if name in known]
    for package in sorted(missing):
        skipped = [name for name in names if CASES[name].package == package and name not in known]
        print(f"skipped {len(skipped)} models: {package} is not installed")
    for outcome in ("wrong", "raised", "refused", "none"):
        for row in rows:
            if row["outcome"] == outcome:
                print(f"{outcome}: {row['model']}: {row['cause']}")
    for kind in dict.fromkeys(CASES[row["model"]].kind for row in rows):
        own = [row for row in rows if CASES[row["model"]].kind == kind]
        counts = ", ".join(f"{sum(row['outcome'] == outcome for row in own)} {outcome}" for outcome in OUTCOMES)
        share = statistics.mean(row["share"] for row in own)
        print(f"{kind:28} {len(own):3} models: {counts}; mean share of parameters reached {share:.1%}")
    if rows:
        seconds = [row["seconds"] for row in rows]
        counts = ", ".join(f"{sum(row['outcome'] == outcome for row in rows)} {outcome}" for outcome in OUTCOMES)
        print(f"{len(rows)} models: {counts}; search: median {statistics.median(seconds)} s, worst {max(seconds)} s")


def known_results(output: Path) -> dict[str, dict[str, Any]]:
    """The results that a file holds, by model."""
    if not output.exists():
        return {}
    return {line["model"]: line for line in map(json.loads, output.read_text().splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kind", choices=("classification", "segmentation", "video", "detection", "unseen"), default="classification"
    )
    parser.add_argument("--verify", action="store_true", help="move every model in float64 and compare outputs")
    parser.add_argument(
        "--output", type=Path, help="default: detection.jsonl; of unseen models benchmarks/results/detection.jsonl"
    )
    parser.add_argument("models", nargs="*", help="names of models; all of the kind by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.kind == "unseen":
        check_unseen(arguments.models, arguments.output or UNSEEN_RESULTS)
        return
    output = arguments.output or Path("detection.jsonl")
    names = arguments.models or names_of(arguments.kind)
    known = known_results(output)
    for name in names:
        if name not in known or (arguments.verify and "holds" not in known[name]):
            known[name] = measure(name, verify=arguments.verify)
            with output.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
        line = known[name]
        shares = "  ".join(f"{group} {line['shares'][group]:7.2%}" for group in GROUPS)
        verdict = f"  error {line['error']:.0e}{'' if line['holds'] else ' WRONG'}" if "holds" in line else ""
        print(f"{name:28} {line['cpu_seconds']:5.1f} s  {line['sites']:5} sites  {shares}{verdict}", flush=True)
    rows = [known[name] for name in names]
    seconds = [row["cpu_seconds"] for row in rows]
    means = ", ".join(f"{group} {statistics.mean(row['shares'][group] for row in rows):.2%}" for group in GROUPS)
    print(f"{len(rows)} models; seconds of one core: median {statistics.median(seconds):.1f}, worst {max(seconds):.1f}")
    print(f"mean share of parameters reached: {means}")
    checked = [row for row in rows if "holds" in row]
    if checked:
        wrong = [row["model"] for row in checked if not row["holds"]]
        print(
            f"verified {len(checked)}: largest error {max(row['error'] for row in checked):.1e}, wrong: {wrong or 'none'}"
        )


if __name__ == "__main__":
    main()
