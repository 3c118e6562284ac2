"""Contract: packed files among real models, wrappers, types, devices, threads and damaged disks.

1. A file is a safetensors file, written whole; what can be written is read again, bit for bit, and what cannot is
   refused by its name before anything is written.
2. A load gives the model that ``load_state_dict`` would: its types, ties, hooks, ``requires_grad``, and extra state; a
   file that does not fit is a PackedFileError that names what, and changes nothing.
3. A loaded model does not depend on what becomes of its file, unless ``mmap=True`` asks for that.
"""

from __future__ import annotations

import copy
import json
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import askew_kernels as ak
from askew_kernels.deploy import files, tensorfile
from askew_kernels.deploy.files import KEY, PackedFile, PackedFileError
from askew_kernels.nn import PackedLinear
from askew_kernels.quant import Binary, Codebook, Ternary, Uniform

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4, bias=False)))


def pack(model, grid=None, **options):
    config = ak.QuantConfig(grid or Uniform(4), scale="absmax", **options)
    return ak.pack_(ak.hard_quantize_(ak.quantize_(model, config)))


def with_buffer(value, name="held", model=None):
    model = plain() if model is None else model
    model.register_buffer(name, value)
    return model


def raw(t):
    """The bytes of a tensor, and what they mean."""
    t = t.detach().to_dense().resolve_conj().resolve_neg().contiguous()
    return t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).tolist()


def bits_of(model):
    return {k: raw(v) for k, v in model.state_dict().items()}


@pytest.fixture
def path(tmp_path):
    """In a folder that holds nothing else when the test ends."""
    yield tmp_path / "model.safetensors"
    assert {p.name for p in tmp_path.iterdir()} <= {"model.safetensors"}


@pytest.fixture
def saved(path):
    model = pack(plain())
    ak.save_packed(model, path)
    return model


def refused(path, target, *words):
    """The load is a PackedFileError with these words, and the target is the same objects and bits as before."""
    before = {n: m for n, m in target.named_modules(remove_duplicate=False)}
    tensors = {n: (p, p if p.is_meta else p.clone()) for n, p in files._Names(target, path).tensors.items()}
    with pytest.raises(PackedFileError) as caught:
        ak.load_packed(path, target)
    assert str(caught.value).startswith(str(path))
    assert all(word in str(caught.value) for word in words), caught.value
    assert before == {n: m for n, m in target.named_modules(remove_duplicate=False)}
    now = files._Names(target, path).tensors
    assert all(now[n] is p and (p.is_meta or raw(p) == raw(value)) for n, (p, value) in tensors.items())


# ---- the container ---------------------------------------------------------------------------------------------------

TENSORS = {
    "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "expanded": torch.ones(1).expand(5), "mask": torch.tensor([True, False]), "int64": torch.tensor([-(2**62)]),
    "uint16": torch.tensor([65535], dtype=torch.uint16), "narrow": torch.tensor([1.0, -0.0]).half(),
    "nan": torch.tensor([float("nan"), float("inf")], dtype=torch.bfloat16), "odd": torch.ones(3, dtype=torch.uint8),
    "float8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), "complex": torch.tensor([1 + 2j]),
    "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(), "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    "part": torch.arange(9.0)[3:5], "strided": torch.arange(9.0)[::2],
}  # fmt: skip


def test_every_kind_of_tensor_comes_back(path):
    model = pack(plain())
    for name, t in TENSORS.items():
        model.register_buffer(name, t)
    ak.save_packed(model, path)
    target = plain(1)
    for name, t in TENSORS.items():
        target.register_buffer(name, torch.zeros(t.shape).to(t.dtype))
    ak.load_packed(path, target)
    assert bits_of(target) == bits_of(model)
    for name, t in pytest.importorskip("safetensors.torch").load_file(path).items():  # the library reads the file too
        assert raw(t) == bits_of(model)[name]


def test_a_lazy_view_and_its_base_are_two_tensors(path):
    base = torch.tensor([1 + 2j, 3 - 1j])
    model = with_buffer(base.conj(), "mirrored", with_buffer(base, model=pack(plain())))
    ak.save_packed(model, path)
    zero = torch.zeros(2, dtype=torch.complex64)
    target = ak.load_packed(path, with_buffer(zero.clone(), "mirrored", with_buffer(zero)))
    assert target.held.tolist() == base.tolist() and target.mirrored.tolist() == base.conj().tolist()


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(), "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "complex128": lambda: torch.ones(2, dtype=torch.complex128), "nested": nested,
    "complex32": lambda: torch.ones(2, dtype=torch.complex32), "meta": lambda: torch.ones(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(), "__metadata__": lambda: torch.ones(1),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_what_a_file_cannot_hold_is_refused_by_its_name(name, path):
    path.write_text("old")
    with pytest.raises(PackedFileError, match=f"^{path}: .*{name}"):
        ak.save_packed(with_buffer(ODD[name](), name, pack(plain())), path)
    lazy = pack(plain())
    lazy.later = nn.LazyLinear(3)
    with pytest.raises(PackedFileError, match="later.weight is not initialised"):
        ak.save_packed(lazy, path)
    assert path.read_text() == "old"


def test_nothing_else_needs_to_be_installed(saved, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    ak.save_packed(saved, path)
    assert bits_of(ak.load_packed(path, plain(1))) == bits_of(saved)
    assert len(PackedFile(path).stored) == 7


def test_files_of_the_library_are_read(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    stored = {name: t.clone().contiguous().resolve_conj().resolve_neg() for name, t in TENSORS.items()}
    library.save_file(stored, tmp_path / "theirs")
    read = tensorfile.read(tmp_path / "theirs")
    assert {k: raw(v) for k, v in read.tensors.items()} == {
        k: raw(v) for k, v in stored.items()
    } and read.metadata == {}
    (tmp_path / "moved").write_bytes(shifted((tmp_path / "theirs").read_bytes(), 3))  # the tensors at odd places
    for options in ({}, {"mmap": True}):
        read = tensorfile.read(tmp_path / "moved", **options)
        assert {k: raw(v) for k, v in read.tensors.items()} == {k: raw(v) for k, v in stored.items()}


def shifted(data, spaces):
    length = int.from_bytes(data[:8], "little") + spaces
    return length.to_bytes(8, "little") + data[8 : 8 + length - spaces] + b" " * spaces + data[8 + length - spaces :]


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


BAD_HEADERS = {
    "not JSON": b"{", "not UTF-8": b"\xff\xfe", "no object": b"[]", "deep": b"[" * 100_000,
    "no text": b'{"__metadata__": 3}',
    "metadata": {"__metadata__": {"a": 1}, "a": entry()}, "no type": {"a": entry(dtype=None)},
    "type": {"a": entry(dtype="F31")}, "negative": {"a": entry(shape=[-2])}, "text": {"a": entry(shape="2")},
    "bool": {"a": entry(shape=[True])}, "float": {"a": entry(shape=[2.0])}, "late": {"a": entry(data_offsets=[1, 9])},
    "one offset": {"a": entry(data_offsets=[0])}, "float offset": {"a": entry(data_offsets=[0.0, 8])},
    "overlap": {"a": entry(), "b": entry()}, "gap": {"a": entry(shape=[1], data_offsets=[4, 8])},
    "short": {"a": entry(shape=[1], data_offsets=[0, 4])}, "long": {"a": entry(shape=[4], data_offsets=[0, 16])},
    "huge": {"a": entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]), "b": entry()},
    "digits": b'{"a": ' + b"9" * 10_000 + b"}", "lost shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
}  # fmt: skip


@pytest.mark.parametrize("map_it", [False, True])
@pytest.mark.parametrize("why", BAD_HEADERS)
def test_a_bad_header_is_an_error_that_names_the_file(why, map_it, path):
    text = BAD_HEADERS[why] if isinstance(BAD_HEADERS[why], bytes) else json.dumps(BAD_HEADERS[why]).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(PackedFileError, match=f"^{path}: (not a whole safetensors file|a safetensors file without)"):
        PackedFile(path, mmap=map_it)


def test_cut_files_are_errors_and_nothing_worse(saved, path):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        for options in ({}, {"verify": False}, {"verify": False, "mmap": True}):
            with pytest.raises(PackedFileError, match="not a whole safetensors file"):
                ak.load_packed(path, plain(), **options)
    path.write_bytes((2**63).to_bytes(8, "little") + whole[8:])  # a header of 9 exabytes
    with pytest.raises(PackedFileError, match="a header of 9223372036854775808 bytes"):
        ak.load_packed(path, plain())


def test_a_file_that_is_cut_while_it_is_read(saved, path, monkeypatch):
    header = tensorfile._header

    def then_cut(*arguments):
        found = header(*arguments)
        os.truncate(path, path.stat().st_size // 2)
        return found

    monkeypatch.setattr(tensorfile, "_header", then_cut)
    ak.save_packed(with_buffer(torch.ones(10**6), model=saved), path)  # more than a buffer of the reader
    with pytest.raises(PackedFileError, match="cut while it was read"):
        ak.load_packed(path, with_buffer(torch.zeros(10**6), model=plain()))


def test_what_is_no_file(tmp_path):
    with pytest.raises(PackedFileError, match="is a folder or a device"):
        ak.load_packed(tmp_path, plain())
    with pytest.raises(PackedFileError, match="cannot be written"):
        ak.save_packed(pack(plain()), tmp_path)
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        ak.load_packed(tmp_path / "absent", plain())


@pytest.mark.parametrize("name", ["r" * 243 + ".safetensors", os.fsdecode(b"caf\xe9"), "ä b"])
def test_paths(name, tmp_path):
    model = pack(plain())
    for path in (tmp_path / name, str(tmp_path / name), os.fsencode(tmp_path / name)):
        ak.save_packed(model, path)
        assert bits_of(ak.load_packed(path, plain(1))) == bits_of(model)
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(PackedFileError, match="not a whole safetensors file"):
        ak.load_packed(path, plain(1))
    assert os.listdir(tmp_path) == [name]


def test_threads_save_and_load_one_name(path):
    models, failures = [pack(plain(seed)) for seed in (0, 1)], []
    ak.save_packed(models[0], path)
    states = [bits_of(m) for m in models]

    def work(act):
        for _ in range(15):
            try:
                act()
            except Exception as error:
                failures.append(repr(error))

    def load():
        assert bits_of(ak.load_packed(path, plain())) in states

    threads = [threading.Thread(target=work, args=(lambda m=m: ak.save_packed(m, path),)) for m in models]
    threads += [threading.Thread(target=work, args=(load,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


LAST = """
import atexit, sys, threading, time, torch
import askew_kernels as ak
model = ak.pack_(ak.hard_quantize_(ak.quantize_(torch.nn.Sequential(torch.nn.Linear(8, 4)))))
def last(name):
    ak.save_packed(model, sys.argv[1] + name)
    ak.load_packed(sys.argv[1] + name, torch.nn.Sequential(torch.nn.Linear(8, 4)))
def late():
    threading.main_thread().join()
    last("thread")
threading.Thread(target=late).start()
atexit.register(last, "exit")
"""


def test_the_last_save_of_a_process(tmp_path):
    """In a thread that outlives the main one, and in an exit function: no thread can be started there any more."""
    done = subprocess.run([sys.executable, "-c", LAST, f"{tmp_path}/"], cwd=Path(ak.__file__).parents[1],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    assert sorted(os.listdir(tmp_path)) == ["exit", "thread"]


# ---- names -----------------------------------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


def inside(wrapper):
    def wrap(model):
        model[2] = wrapper(model[2])
        return model

    return wrap


def around_a_layer(wrapper):
    def wrap(model):
        model[0] = wrapper(model[0])
        return model

    return wrap


WRAPPERS = {
    "nothing": lambda m: m, "compile": compiled, "compile inside": inside(compiled), "DataParallel": nn.DataParallel,
    "compiled layer": around_a_layer(compiled), "checkpoint": checkpointed, "checkpoint inside": inside(checkpointed),
    "checkpointed layer": around_a_layer(checkpointed), "both": lambda m: compiled(inside(checkpointed)(m)),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_and_what_it_wraps_share_files(wrapper, path):
    model = pack(plain())
    want = model(X)
    ak.save_packed(WRAPPERS[wrapper](model), path)
    assert list(PackedFile(path).layers) == ["0", "2.1"]
    for other in ("nothing", wrapper):
        target = WRAPPERS[other](plain(1))
        assert ak.load_packed(path, target) is target
        assert torch.equal(target(X), want)


class Renaming(nn.Module):
    """Hides its inner module in the state_dict, as many wrappers do; ``change`` does something to the values."""

    def __init__(self, inner, change=lambda t: t):
        super().__init__()
        self.inner, self.change = inner, change
        self.register_state_dict_post_hook(self.hide)

    @staticmethod
    def hide(module, state, prefix, metadata):
        for key in [k for k in state if k.startswith(f"{prefix}inner.")]:
            state[prefix + key[len(prefix) + 6 :]] = module.change(state.pop(key))

    def forward(self, x):
        return self.inner(x)


def test_renaming_hooks(path):
    model = Renaming(pack(plain()))
    ak.save_packed(model, path)
    for target in (Renaming(plain(1)), plain(1)):
        assert torch.equal(ak.load_packed(path, target)(X), model(X))


def test_hooks_that_make_tensors_are_refused_at_save(path):
    with pytest.raises(PackedFileError, match="inner.0: a state_dict hook hides or renames it"):
        ak.save_packed(Renaming(pack(plain()), torch.clone), path)
    model = pack(plain())
    model.register_state_dict_post_hook(lambda m, state, prefix, meta: state.update(note=torch.ones(2)))
    with pytest.raises(PackedFileError, match="note: a state_dict hook made it"):
        ak.save_packed(model, path)
    model = pack(plain())
    model.register_state_dict_post_hook(lambda m, state, prefix, meta: state.__delitem__("0.bias"))
    with pytest.raises(PackedFileError, match="0.bias: a state_dict hook hides or renames it"):
        ak.save_packed(model, path)
    twins = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twins[1].weight = twins[0].weight
    with pytest.raises(PackedFileError, match="hides or renames it"):  # which of the two is it?
        ak.save_packed(Renaming(pack(twins)), path)
    model = pack(plain())
    model.register_state_dict_post_hook(lambda m, state, prefix, meta: state.update(steps=3))
    with pytest.raises(PackedFileError, match="steps is a int; only tensors can be saved"):
        ak.save_packed(model, path)
    assert not path.exists()


def test_hooks_that_copy_tensors_are_fine(path):
    def detach(module, state, prefix, metadata):
        for key in state:
            state[key] = state[key].detach().clone()

    model, target = pack(plain()), plain(1)
    for m in (model, target):
        m.register_state_dict_post_hook(detach)
    ak.save_packed(model, path)
    assert bits_of(ak.load_packed(path, target)) == bits_of(model)


class OwnStateDict(nn.Sequential):
    def state_dict(self):
        return {f"of.{k}": v.cpu() for k, v in super().state_dict().items()}


def test_a_state_dict_of_the_model_s_own(path):
    """Tensors that are no longer the model's, under names that are not: refused at save. A plain one is fine."""
    with pytest.raises(PackedFileError, match="0: a state_dict hook hides or renames it"):
        ak.save_packed(pack(OwnStateDict(*plain())), path)

    class Plain(nn.Sequential):
        def state_dict(self):
            return super().state_dict()

    ak.save_packed(model := pack(Plain(*plain())), path)
    assert torch.equal(ak.load_packed(path, Plain(*plain(1)))(X), model(X))


def test_a_model_that_is_itself_a_layer(path):
    with pytest.raises(PackedFileError, match="the model is itself a layer"):
        ak.save_packed(PackedLinear(4, 4), path)


def test_scales_that_a_load_would_refuse_are_refused_at_save(saved, path):
    saved[0].weight_scale[2] = float("nan")
    with pytest.raises(PackedFileError, match="0.weight_scale: expected positive finite scales"):
        ak.save_packed(saved, path)


# ---- extra state -----------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.inner, self.state, self.refuses = plain(), state, False

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        if self.refuses:
            raise RuntimeError("not this")
        self.state = state


@pytest.mark.parametrize("state", [torch.tensor(5), torch.ones(2, 3).half(), 7, None, "text", [1, {"a": [0.1, True]}]])
def test_extra_state_comes_back(state, path):
    ak.save_packed(pack(Counter(state)), path)
    loaded = ak.load_packed(path, Counter(-1))
    assert type(loaded.state) is type(state)
    assert torch.equal(loaded.state, state) if isinstance(state, Tensor) else loaded.state == state


Tensor = torch.Tensor


@pytest.mark.parametrize("state", [(1, 2), {1: 2}, {"a": torch.ones(1)}, {3}, b"x", float("nan"), object()], ids=repr)
def test_extra_state_that_a_file_cannot_hold(state, path):
    with pytest.raises(PackedFileError, match="_extra_state: extra state is saved where it is a tensor or JSON"):
        ak.save_packed(pack(Counter(state)), path)


def test_extra_state_is_strict_and_whole(saved, path):
    class Outer(nn.ModuleDict):
        pass

    model = pack(Outer({"a": Counter(1), "b": Counter(2)}))
    ak.save_packed(model, path)
    refused(path, Outer({"a": Counter(1), "b": nn.ModuleDict({"inner": plain()})}), "the model lacks b._extra_state")
    target = Outer({"a": Counter(-1), "b": Counter(-2)})
    target["b"].refuses = True
    with pytest.raises(PackedFileError, match="b._extra_state: RuntimeError: not this"):
        ak.load_packed(path, target)
    assert target["a"].state == -1 and type(target["a"].inner[0]) is nn.Linear
    ak.save_packed(pack(Outer({"a": nn.ModuleDict({"inner": plain()}), "b": Counter(3)})), path)
    refused(path, target, "the file lacks", "a._extra_state")


# ---- types, ties, hooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_keeps_its_type(stored, there, device, path):
    model = pack(plain().to(stored))
    ak.save_packed(model, path)
    for map_it in (False, True):
        loaded = ak.load_packed(path, plain(1).to(there).to(device), mmap=map_it)
        assert {p.dtype for p in loaded.parameters()} | {m.weight_dtype for m in (loaded[0], loaded[2][1])} == {there}
        y = loaded(X.to(there))
        assert y.dtype == there
        torch.testing.assert_close(y.float(), model(X.to(stored)).float(), rtol=0.05, atol=0.05)


def test_numbers_that_do_not_survive(path):
    def build():
        return with_buffer(torch.zeros(2, dtype=torch.int64), "count")

    model = build()
    model.count += 2**40
    nn.init.constant_(model[1].weight, 1e6)
    ak.save_packed(pack(model), path)
    refused(path, build().half(), "1.weight: torch.float16, the model's type, does not hold")
    target = build()
    target.count = target.count.int()
    refused(path, target, "count: torch.int32, the model's type, does not hold")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("wrong", [torch.int8, torch.bool, torch.complex64, torch.uint8])
def test_wrong_types_change_nothing(wrong, device, path):
    model = pack(plain())
    model[1].weight = nn.Parameter(torch.ones(8).to(wrong), requires_grad=False)
    ak.save_packed(model, path)
    refused(path, plain(1).to(device), f"1.weight: expected torch.float32, the file has {wrong}")


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.a, self.b, self.norm, self.free = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.table, self.head = nn.Embedding(6, 6), nn.Linear(6, 6, bias=False)
        if tie:
            self.b.bias = self.norm.bias = self.free.bias = self.a.bias
            self.head.weight = self.table.weight
            self.register_buffer("one", torch.ones(2))
            self.register_buffer("two", self.one)

    def forward(self, i):
        return self.head(self.free(self.norm(self.b(self.a(self.table(i))))))


@pytest.mark.parametrize("map_it", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_of_the_model(device, map_it, path):
    torch.manual_seed(0)
    model, i = pack(Tied()), torch.arange(5)
    ak.save_packed(model, path)
    with torch.device(device):
        target = Tied()
    loaded = ak.load_packed(path, target, mmap=map_it)
    assert loaded.a.bias is loaded.b.bias is loaded.norm.bias is loaded.free.bias
    assert loaded.two is loaded.one and not loaded.one.is_meta
    assert len([*loaded.parameters()]) == len([*model.parameters()])
    assert torch.equal(loaded(i), model(i))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_in_the_file_apart_in_the_model(device, path):
    model = pack(nn.ModuleDict({"of": Tied()}))
    del model["of"].one, model["of"].two
    ak.save_packed(model, path)
    with torch.device(device):
        target = nn.ModuleDict({"of": Tied(tie=False)})
    ak.load_packed(path, target)
    assert len({p.data_ptr() for p in target.parameters()}) == len([*target.parameters()]) == 7


def test_apart_in_the_file_tied_in_the_model(path):
    def build(tie):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8))
        if tie:
            model[2].weight = model[1].weight
            model[3] = model[0]
        return model

    torch.manual_seed(0)
    model = build(False)
    model[3].load_state_dict(model[0].state_dict())
    ak.save_packed(pack(model), path)  # equal numbers: no harm
    loaded = ak.load_packed(path, build(True))
    assert loaded[3] is loaded[0] and loaded[2].weight is loaded[1].weight
    model[2].weight.data[3] = 2
    ak.save_packed(model, path)
    refused(path, build(True), "2.weight: is one tensor with 1.weight in the model, and another in the file")
    model[2].weight.data[3] = 1
    model[3].weight_codes[0, 0] ^= 1
    ak.save_packed(model, path)
    refused(path, build(True), "layer 3: is 0 in the model, and another layer in the file")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_hangs_on_the_model_stays(device, saved, path):
    target, seen = plain(1).to(device), []
    target[0].bias.requires_grad_(False)
    target[1].weight.requires_grad_(False)
    target[2].eval()
    kept = [target[0].bias, target[1].weight]
    handle = target[0].register_forward_hook(lambda m, x, y: seen.append(type(m)) or y.clamp(-0.1, 0.1))
    ak.load_packed(path, target)
    assert not target[0].bias.requires_grad and not target[1].weight.requires_grad and target[1].bias.requires_grad
    assert target[0].training and not target[2][1].training
    want = saved[2](saved[1](saved[0](X).clamp(-0.1, 0.1)))
    assert torch.equal(target(X), want) and seen == [PackedLinear]
    assert device == "meta" or [target[0].bias, target[1].weight] == kept  # an optimizer goes on with them
    handle.remove()
    assert torch.equal(target(X), saved(X))


def test_buffers_that_are_no_part_of_a_state_dict_stay(saved, path):
    target = plain(1)
    target[0].register_buffer("mask", torch.full((3,), 7.0), persistent=False)
    target.register_buffer("positions", torch.arange(4.0), persistent=False)
    ak.load_packed(path, target)
    assert target[0].mask.tolist() == [7.0] * 3 and target.positions.tolist() == [0, 1, 2, 3]
    assert set(target.state_dict()) == set(saved.state_dict())


def test_what_hangs_on_packed_layers_goes_along(saved, path):
    saved[0].gain = nn.Parameter(torch.full((3,), 2.0))
    saved[0].adapter = nn.LayerNorm(2)
    ak.save_packed(saved, path)
    refused(path, plain(1), "the model lacks 0.adapter.bias, 0.adapter.weight, 0.gain")
    target = plain(1)
    target[0].gain, target[0].adapter = nn.Parameter(torch.zeros(3)), nn.LayerNorm(2)
    ak.load_packed(path, target)
    assert isinstance(target[0], PackedLinear) and target[0].gain.tolist() == [2.0] * 3
    again = plain(2)
    again[0].gain = nn.Parameter(torch.zeros(3))
    refused(path, again, "the model lacks 0.adapter")


def test_only_codes_scales_biases_and_a_description_are_stored(saved, path):
    keys = {"0.weight_codes", "0.weight_scale", "0.bias", "1.weight", "1.bias", "2.1.weight_codes", "2.1.weight_scale"}
    assert set(PackedFile(path).tensors) == keys and not PackedFile(path).extra


# ---- models that a file does not fit ---------------------------------------------------------------------------------


def other_of_its_shape(grid, **options):
    return lambda: pack(plain(1), grid, **options)


def normed():
    model = plain(1)
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def positions():
    with torch.device("meta"):
        model = plain()
        model[1].register_buffer("positions", torch.arange(8.0), persistent=False)
        model[0].register_buffer("mask", torch.ones(8), persistent=False)
    return model


def complex_(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.complex64))
    return model


def expanded():
    model = plain(1)
    model[1].weight = nn.Parameter(torch.ones(1).expand(8))
    return model


MISFITS = {
    "a packed grid": (other_of_its_shape(Uniform(4, signed=False)), "layer 0: grid: expected Uniform(bits=4, signed=F"),
    "a quantized grid": (lambda: ak.quantize_(plain(1), ak.QuantConfig(Uniform(4, narrow=True))), "layer 0: grid"),
    "a codebook": (other_of_its_shape(Codebook([float(i) for i in range(-8, 8)])), "layer 0: grid: expected Codebook"),
    "an activation": (other_of_its_shape(None, activation=Uniform(8)), "layer 0: activation: expected Uniform(bits=8"),
    "a weight norm": (normed, "layer 0: its weight is not a Parameter but computed"),
    "another kind": (lambda: complex_(plain(1)), "layer 0: a weight of type torch.complex64"),
    "buffers": (positions, "0.mask, 1.positions: on the meta device in the model and not in the file"),
    "a quantized layer": (
        lambda: ak.quantize_(plain(1).append(nn.Linear(4, 4)), {"3": ak.QuantConfig(Uniform(4))}),
        "layer 3 is quantized in the model and not packed in the file",
    ),
    "an expanded tensor": (
        expanded,
        "1.weight: is an expanded view in the model, which cannot be filled",
    ),
    "a sparse tensor": (lambda: with_buffer(torch.eye(3).to_sparse()), "the file lacks held"),
}  # fmt: skip


@pytest.mark.parametrize("why", MISFITS)
def test_a_model_that_the_file_does_not_fit_stays_as_it_was(why, saved, path):
    build, message = MISFITS[why]
    refused(path, build(), message)


def test_a_sparse_tensor_of_the_model_cannot_be_filled(path):
    ak.save_packed(with_buffer(torch.eye(3), model=pack(plain())), path)
    refused(path, with_buffer(torch.eye(3).to_sparse()), "held: is of layout torch.sparse_coo in the model")


# ---- ambient modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Uniform(3), Ternary(), Binary(), Codebook([-1.0, -0.4, 0.0, 0.1, 1.0])], ids=repr)
def test_the_default_device_does_not_matter(grid, path):
    model = pack(plain(), grid)
    ak.save_packed(model, path)
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4, bias=False)))
        assert len(PackedFile(path).stored) == 7
        ak.load_packed(path, target)
        ak.save_packed(model, path)
    assert torch.equal(target(X), model(X))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inference_mode_does_not_matter(device, saved, path):
    for made_inside in (False, True):
        target = plain(1).to(device)
        with torch.inference_mode():
            target = plain(1).to(device) if made_inside else target
            ak.load_packed(path, target)
            assert torch.equal(target(X), saved(X))
            ak.save_packed(target, path)
        if device == "meta" or not made_inside:  # new tensors are ordinary ones
            assert not any(t.is_inference() for t in target.state_dict(keep_vars=True).values())


def test_fake_tensors_are_refused(saved, path):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(8, 8))
        with pytest.raises(PackedFileError, match="cannot be read under a FakeTensorMode"):
            ak.load_packed(path, fake)
    with pytest.raises(PackedFileError, match="layer 0: its weight is a FakeTensor"):
        ak.load_packed(path, fake)


# ---- what becomes of the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_loaded_model_does_not_need_its_file(device, verify, saved, path):
    other = path.with_name("other")
    ak.save_packed(pack(plain(5)), other)
    loaded = ak.load_packed(path, plain(1).to(device), verify=verify)
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(other.read_bytes())  # in place
    assert torch.equal(loaded(X), saved(X))
    path.write_bytes(b"")
    assert torch.equal(loaded(X), saved(X))
    other.unlink()


def test_mapped_on_request(saved, path, monkeypatch):
    found = []
    monkeypatch.setattr(mmap, "mmap", lambda *a, made=mmap.mmap, **k: found.append(made(*a, **k)) or found[-1])
    for target in (plain(1), plain(1).to("meta")):
        loaded = ak.load_packed(path, target, mmap=True)
        assert str(path) in Path("/proc/self/maps").read_text()
        assert torch.equal(loaded(X), saved(X))
        loaded[0].bias.data.zero_()  # copied on write
        loaded[0].weight_codes.zero_()
        assert bits_of(ak.load_packed(path, plain(2))) == bits_of(saved)
    assert len(found) == 2


def test_a_replaced_file_is_read_as_one(saved, path):
    """A save over a mapped file makes a new one: the mapped model stays what it was."""
    loaded = ak.load_packed(path, plain(1).to("meta"), mmap=True)
    ak.save_packed(pack(plain(5)), path)
    assert torch.equal(loaded(X), saved(X))


# ---- others' checkpoints ---------------------------------------------------------------------------------------------


def test_distributed_checkpoints_of_packed_models(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    model, target = pack(plain()), pack(plain(1))
    dcp.save(model.state_dict(), checkpoint_id=str(tmp_path), no_dist=True)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    target.load_state_dict(state)
    assert torch.equal(target(X), model(X))


def test_the_library_saves_packed_models(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    model, target = pack(Tied()), pack(Tied())
    library.save_model(model, str(tmp_path / "m"))
    library.load_model(target, str(tmp_path / "m"))
    assert bits_of(target) == bits_of(model)


def test_torch_save_and_pickle_of_a_loaded_model(saved, path, tmp_path):
    loaded = ak.load_packed(path, plain(1).to("meta"))
    torch.save(loaded[0].state_dict(), tmp_path / "part.pt")
    assert (tmp_path / "part.pt").stat().st_size < 4000  # each tensor has memory of its own
    torch.save(loaded.state_dict(), tmp_path / "all.pt")
    target = copy.deepcopy(loaded)
    target.load_state_dict(torch.load(tmp_path / "all.pt"))
    for name in ("part.pt", "all.pt"):
        (tmp_path / name).unlink()
    assert torch.equal(target(X), saved(X))


# ---- command line ----------------------------------------------------------------------------------------------------


def test_convert_takes_frozen_models_and_odd_paths(tmp_path, capsys):
    from askew_kernels.__main__ import main

    source, target = tmp_path / os.fsdecode(b"in\xe9"), tmp_path / "out"
    model = ak.hard_quantize_(ak.quantize_(plain(), ak.QuantConfig(Uniform(4), scale="absmax")))
    tensorfile.write(source, model.state_dict(), {"format": "pt"}, "pt", lambda _: "pt")
    assert main(["convert", str(source), str(target), "--bits", "4"]) == 0
    loaded = ak.load_packed(target, plain(1))
    assert bits_of(loaded) == bits_of(ak.pack_(model)) and main(["inspect", str(target)]) == 0
    capsys.readouterr()
    for arguments in (["convert", tmp_path, target, "--bits", "4"], ["inspect", tmp_path],
                      ["convert", source, tmp_path, "--bits", "4"], ["inspect", target, "--original", tmp_path / "no"],
                      ["convert", tmp_path / "no", target, "--bits", "4"]):  # fmt: skip
        assert main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"askew_kernels: {arguments[0]}: ") and len(error.splitlines()) == 1
    before = sorted(os.listdir(tmp_path))
    assert main(["convert", str(source), str(source), "--bits", "4"]) == 0  # onto itself
    assert bits_of(ak.load_packed(source, plain(1))) == bits_of(loaded) and sorted(os.listdir(tmp_path)) == before


def test_inspect_takes_the_arguments_of_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, x, *, twice=False):
            return self.mix(x) * (1 + twice)

    model = ak.quantize_(Model(), ak.QuantConfig(Uniform(4), scale="absmax"))
    errors = [ak.inspect(model, batch).layers[0].output_error for batch in (X, (X,), {"x": X, "twice": True})]
    assert errors[0] == errors[1] == errors[2] > 0


def test_inspect_counts_shared_weights_once():
    twins = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))
    twins[1].weight = twins[0].weight
    for model in (ak.quantize_(twins, ak.QuantConfig(Uniform(4), scale="absmax")), ak.pack_(ak.hard_quantize_(twins))):
        report = ak.inspect(model)
        assert [r.bytes for r in report.layers] == [64, 0] and report.other_bytes == 32
        assert report.float_bytes == 4 * 64 + 32


def test_the_document_says_extra_state_only_where_there_is_some(saved, path):
    def document():
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return json.loads(header["__metadata__"][KEY])

    assert "extra" not in document()
    ak.save_packed(pack(Counter([1, 2])), path)
    assert document()["extra"] == {"_extra_state": [1, 2]}


@pytest.mark.parametrize("wrong", [{"stride": "x"}, {"stride": [1.5, 2]}, {"stride": [1, 2, 3]}, {"stride": True},
                                   {"groups": 0}, {"dilation": [2**40, 1]}, {"padding": "huh"},
                                   {"padding_mode": "odd"}, None, [1]])  # fmt: skip
def test_geometry_of_a_damaged_file_is_an_error(wrong, tmp_path):
    """Also where no model is there to compare it with."""
    path = tmp_path / "packed.safetensors"
    model = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2))
    ak.save_packed(ak.pack_(ak.hard_quantize_(ak.quantize_(model))), path)
    file = files.PackedFile(path)
    assert file.empty_layer("0").stride == (2, 2)
    d = file.layers["0"]
    d["geometry"] = d["geometry"] | wrong if isinstance(wrong, dict) else wrong
    files.write_packed(path, file.tensors, file.layers)
    with pytest.raises(files.PackedFileError, match="layer 0: "):
        files.PackedFile(path)
