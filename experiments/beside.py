"""What the whole models share: training, a fresh process, the same model in other libraries, tables of both.

Part of minilm.py and efficientnet.py; by itself it writes their tables into a page:
python -m experiments.beside docs/models.md benchmarks/results/models
"""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import askew_kernels as ak
from askew_kernels.deploy.to_onnx import export_onnx

TORCHAO = {
    "int8 weights": lambda ao: ao.Int8WeightOnlyConfig(),
    "int8 weights and inputs": lambda ao: ao.Int8DynamicActivationInt8WeightConfig(),
    "int4 weights": lambda ao: ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32)),  # type: ignore[attr-defined]
    "int4 weights, int8 inputs": lambda ao: ao.Int8DynamicActivationIntxWeightConfig(torch.int4, ao.PerGroup(32)),  # type: ignore[attr-defined]
}


def arguments(text, bits):
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=bits, choices=bits)
    parser.add_argument("--quick", action="store_true", help="few steps, few rounds of times: to see that it runs")
    parser.add_argument("--out", type=Path, help="write all rows to this JSON file")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the packed files go")
    parser.add_argument("--check", nargs=2, help=argparse.SUPPRESS)  # what the fresh process is given
    return parser.parse_args()


def grid(bits):
    return ak.quant.Ternary() if bits == "ternary" else ak.quant.Uniform(bits=int(bits))


def train(model, loss_of, steps, lr, what):
    """loss_of(step) goes down under the constraint; a line every ten seconds."""
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model, weight_decay=0.0, freeze_scale="init"), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    recipe = ak.Recipe(model, optimizer, steps, settings="finetune")
    told = start = time.monotonic()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        optimizer.step()
        schedule.step()
        recipe.step()
        if (now := time.monotonic()) - told > 10 or step == steps:
            told = now
            print(f"  {what}: step {step} of {steps}, loss {loss.item():.4f}, {now - start:.0f} s", flush=True)


def relative_error(made, targets):
    return sum((y - t).square().sum() / t.square().sum() for y, t in zip(made, targets, strict=True)) / len(targets)


def same_in_a_fresh_process(module, packed, outputs, args):
    """Another Python runs this module, loads the file and must compute these outputs, bit for bit."""
    expected = packed.with_suffix(".expected.pt")
    torch.save(outputs, expected)
    command = [sys.executable, "-m", module, "--check", packed, expected, *["--quick"] * args.quick]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    expected.unlink()


def check(files, run):
    """In that other Python: run(file) beside the outputs that were saved."""
    packed, expected = map(Path, files)
    outputs, wanted = run(packed), torch.load(expected, weights_only=True)
    if not torch.equal(outputs, wanted):
        sys.exit(f"{packed}: outputs differ by up to {(outputs - wanted).abs().max():.3g}")
    print(f"  {packed.name}: loaded in a fresh process, {len(outputs)} outputs bit for bit the same", flush=True)


class Quality:
    """A row for each width: cosine similarity with what the float model gives for held-out inputs, bytes on disk."""

    def __init__(self, model, expected):
        self.model, self.expected = model, expected
        size = sum(t.nbytes for t in model.state_dict().values())
        self.rows = [{"weights": "float32", "mean cosine, not trained": 1.0, **self.cosine(expected), "bytes": size}]

    def cosine(self, outputs):
        similarity = F.cosine_similarity(outputs.double(), self.expected.double(), dim=1)
        return {"mean cosine": similarity.mean().item(), "smallest": similarity.min().item()}

    def add(self, bits, untrained, trained, path):
        row = {"weights": bits, "mean cosine, not trained": self.cosine(untrained)["mean cosine"]}
        self.rows.append(row | self.cosine(trained) | {"bytes": path.stat().st_size})
        print("  " + ", ".join(f"{key} {value}" for key, value in self.rows[-1].items()), flush=True)


def _torchao(model, config):
    """config: from torchao.quantization to a configuration."""
    from torchao import quantization

    made = copy.deepcopy(model)
    quantization.quantize_(made, config(quantization))
    return made


def _bfloat16(model):
    half = copy.deepcopy(model).bfloat16()
    return lambda *x: half(*(t.bfloat16() if t.is_floating_point() else t for t in x))


def _int8_inputs(packed):
    made = copy.deepcopy(packed)
    for layer in ak.nn.packed_layers(made).values():
        layer.set_activations("int8")
    return made


def _onnx(write, inputs, folder):
    """write(path, …) makes the file; it is run with as many threads as torch has."""
    import onnxruntime

    options, path = onnxruntime.SessionOptions(), folder / "model.onnx"
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads disturb all others
    names = [f"x{i}" for i in range(len(inputs))]
    tokens = {1: "tokens"} if inputs[0].dim() == 2 else {}
    axes = {"y": {0: "batch"}, **{name: {0: "batch", **tokens} for name in names}}
    write(inputs, path, input_names=names, output_names=["y"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.unlink()
    return lambda *x: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in zip(names, x, strict=True)})[0])


def _float_onnx(model, inputs, path, **options):
    torch.onnx.export(copy.deepcopy(model), inputs, path, opset_version=20, dynamo=False, **options)


def _our_onnx(model, inputs, path, **options):
    export_onnx(model, inputs, path, operator="MatMulNBits", accuracy_level=4, **options)


def versions(model, packed, inputs, folder):
    """{name: how to make it}: the float model, the same by other libraries, and ours; packed: {bits: model}."""
    made = {
        "torch float32": lambda: model,
        "torch bfloat16": lambda: _bfloat16(model),
        **{f"torchao {what}": lambda config=config: _torchao(model, config) for what, config in TORCHAO.items()},
        "onnxruntime float32": lambda: _onnx(lambda *a, **o: _float_onnx(model, *a, **o), inputs, folder),
    }
    for bits, m in packed.items():
        made |= {
            f"packed, {bits}": lambda m=m: m,
            f"packed, {bits}, int8 inputs": lambda m=m: _int8_inputs(m),
            f"onnxruntime, {bits} exported": lambda m=m: _onnx(lambda *a, **o: _our_onnx(m, *a, **o), inputs, folder),
        }
    return made


@torch.no_grad()
def made_and_missing(makers, inputs):
    """({name: function}, {name: why there is none}): each has computed once."""
    made, missing = {}, {}
    for name, make in makers.items():
        try:
            function = make()
            function(*inputs)
            made[name] = function
        except Exception as error:  # whatever a library of others raises: its row says so
            missing[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return made, missing


@torch.no_grad()
def milliseconds(functions, inputs, rounds):
    """{name: the least time of a call, ms}; one call of each in turn, so that a busy moment hits all alike."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function(*inputs)
            least[name] = min(least[name], 1e3 * (time.perf_counter() - start))
    return least


def report(args, quality, packed, inputs, outputs):
    """Both tables. inputs: {what is timed: its tensors}, the largest last; outputs(model): on the held-out data."""
    largest = list(inputs.values())[-1]
    made, missing = made_and_missing(versions(quality.model, packed, largest, args.folder), largest)
    speed = [{"version": name, **quality.cosine(outputs(function))} for name, function in made.items()]
    for what, x in inputs.items():
        print(f"timing {len(made)} versions with {what}", flush=True)
        times = milliseconds(made, x, 2 if args.quick else 10)
        for row in speed:
            row[f"{what}, ms"] = times[row["version"]]
    about = {"processor": ak.runtime.cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    rows = {"about": about, "quality": quality.rows, "speed": speed, "missing": missing}
    print("", tables(rows), sep="\n")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def tables(rows):
    """What ``report`` wrote, as Markdown."""
    lines = [*table(rows["quality"]), "", *table(rows["speed"]), ""]
    lines += [f"{name} did not run here ({why})." for name, why in rows["missing"].items()]
    return "\n".join([*lines, "; ".join(f"{key} {value}" for key, value in rows["about"].items()) + "."])


def table(rows):
    """Lines of rows that have the same keys."""
    cell = {float: lambda x: f"{x:.4f}" if abs(x) <= 1 else f"{x:,.1f}", int: "{:,}".format}
    lines = (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    return ["| " + " | ".join(cell.get(type(x), str)(x) for x in line) + " |" for line in lines]


def fill(page, folder):
    """The text ``page`` with the tables of folder/NAME.json between <!-- NAME … --> and <!-- /NAME -->."""
    for file in sorted(folder.glob("*.json")):
        inside = re.compile(rf"(<!-- {file.stem}\b[^\n]*-->\n).*?(<!-- /{file.stem} -->)", re.DOTALL)
        text = tables(json.loads(file.read_text()))
        page = inside.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)
    return page


if __name__ == "__main__":
    page, folder = map(Path, sys.argv[1:])
    page.write_text(fill(page.read_text(), folder))
