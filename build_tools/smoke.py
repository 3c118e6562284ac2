"""What every installation is tried with: python smoke.py [backend], "cpp" unless told otherwise.

A model is quantized, trained, packed, saved and loaded; the operators run where they were meant to, as one line says.
"""

import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path

warnings.simplefilter("error", RuntimeWarning)  # the slow reference where nobody asked for it

import torch  # noqa: E402

import askew_kernels as ak  # noqa: E402


def main(expected: str) -> None:
    backend, why = ak.runtime.choose_backend("cpu")
    assert backend == expected, f"expected {expected} on the CPU, got {backend}: {why}"
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randint(0, 8, (256,))

    def build():
        return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8))

    model = ak.quantize_(build(), ak.QuantConfig(weight=ak.quant.Uniform(bits=4)))
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.2, momentum=0.9)
    recipe = ak.Recipe(model, optimizer, 60)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recipe.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses
    ak.hard_quantize_(model)
    expected_output = model(x)
    ak.pack_(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        ak.save_packed(model, str(file))
        loaded = ak.load_packed(str(file), build())
    torch.testing.assert_close(loaded(x), expected_output, rtol=1e-4, atol=1e-4)
    with ak.runtime.use_backend("reference"):
        torch.testing.assert_close(loaded(x), expected_output, rtol=1e-4, atol=1e-4)
    library = ak.runtime._C
    facts = {"askew_kernels": ak.__version__, "python": platform.python_version(), "torch": torch.__version__,
             "backend": backend, "cpu": ak.runtime.cpu_capability(),
             "cuda": library.cuda_archs if library is not None else "", "loss": [losses[0], losses[-1]],
             "from": str(Path(ak.__file__).parent)}  # fmt: skip
    print("smoke test passed:", json.dumps(facts))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["cpp"]))
