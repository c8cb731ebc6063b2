"""What the three scripts share: files, flags, the device, the optimizer Muon, images and plots.
Read vae.py first, and come here for a name that it does not define."""

import argparse
import collections
import itertools
import json
import math
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the person at the keyboard can put right; the message says how."""


def run_script(main, torchrun=False):
    """Call main(). A UserError, or an error of the system such as a missing file, ends the script
    in one line and status 2. torchrun: whether main works in several processes."""
    os.environ["MPLBACKEND"] = "agg"  # one inherited from a notebook breaks matplotlib
    script = Path(sys.argv[0]).name
    try:
        if not torchrun and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("this script trains in one process: start it without torchrun")
        main()
    except (UserError, OSError) as error:
        if torchrun or os.environ.get("RANK", "0") == "0":  # else all processes say the same
            print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr)
        sys.exit(130)


# -- Files and checkpoints --------------------------------------------------------------------


def save(path, write):
    """Let write(file) fill a temporary file, then rename it to `path`, so this is always whole."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # another process may save the same file
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only after an error


def write_json(path, *rows, indent=None):
    """Write each of `rows` as JSON, on a line of its own if there is no indent."""
    text = "".join(json.dumps(row, indent=indent) + "\n" for row in rows)
    save(path, lambda file: file.write(text.encode("utf-8")))


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain Python values, with "model" (a state_dict), "args" (a dict)
    and more. Raises UserError if a weight is inf or nan."""
    if not all(weights.isfinite().all() for weights in checkpoint["model"].values()):
        raise UserError("the weights are no longer finite: start again with a lower learning rate "
                        f"({path.parent} holds what was saved before)")
    save(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path, script):
    """Read what save_checkpoint wrote. -> the dict, its tensors on the CPU. Raises UserError if the
    file is missing, damaged, or of another script."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        made_by = checkpoint["args"]["script"]
    except Exception as error:  # a dozen kinds, from FileNotFoundError to UnpicklingError
        raise UserError(f"{path} cannot be read: {error!r:.200}") from error
    if made_by != script:
        raise UserError(f"{path} was made by {made_by}, not by {script}")
    return checkpoint


def new_run_folder(path):
    """Make the folder `path`, or path-2, path-3, ... if a run is there already. -> its path"""
    for i in itertools.count(1):
        folder = Path(path if i == 1 else f"{path}-{i}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            open(folder / "args.json", "x").close()  # fails if it exists; the script fills it
            return folder
        except FileExistsError:
            continue


# -- The command line -------------------------------------------------------------------------


def number(kind, low, high=2**31):
    """An argparse type: an int or a float (`kind`) from low to high, so neither inf nor nan."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value: 'two'"
    return parse


# --dataset -> the name of torchvision's class, which is also the name of its folder
DATASETS = {"auto": "MNIST", "mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}


def add_image_arguments(parser, batch_size):
    """The flags of the scripts that train on images"""
    names = [*DATASETS, "glyphs"]
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=20, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=batch_size, help="images per step")
    add("--dataset", type=lambda text: text if text in names else os.path.abspath(text),
        default="auto", metavar="|".join([*names, "DIR"]), help="auto: mnist, or glyphs (digits "
        "drawn from fonts) if it is neither here nor online; DIR: all pictures below your folder")
    add("--image-size", type=number(int, 8), metavar="N", help="own pictures are cut to squares "
        "and scaled to N x N pixels (32 if not given)")
    parser.set_defaults(num_images=None)  # load_images counts them


def add_run_arguments(parser):
    """The flags of all scripts that train"""
    add = parser.add_argument
    add("--limit", type=number(int, 1), metavar="N", help="a quick try: N training images, "
        "N / 10 to validate and N / 10 to test; or the first N characters of a text")
    add("--seed", type=number(int, 0), default=42, help="for weights, data order and noise")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto takes cuda if it is there, else cpu (never mps)")
    add("--no-amp", action="store_true", help="turn off autocast to 16 bits (CUDA only)")
    add("--data-dir", type=os.path.abspath, default="data", metavar="DIR",
        help="where the data is, or is downloaded to")
    add("--out-dir", metavar="DIR", help="the run's folder, instead of one in runs/; gets a suffix "
        "if it already holds a run")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with the run's own arguments")
    parser.set_defaults(script=parser.prog)  # so that load_checkpoint knows who made a file


def parse_args(parser, argv, may_change):
    """-> the arguments, and with --resume the checkpoint last.pt, else None. With --resume the
    run's own arguments are the defaults. Only --device, --no-amp, --data-dir and those in
    may_change may get another value: raises UserError for others."""
    args = parser.parse_args(argv)
    if args.resume is None:
        return args, None
    checkpoint = load_checkpoint(Path(args.resume, "last.pt"), script=parser.prog)
    parser.set_defaults(**checkpoint["args"])
    args = parser.parse_args(argv)
    allowed = {"resume", "device", "no_amp", "data_dir", *may_change}
    for name, value in checkpoint["args"].items():
        if name not in allowed and getattr(args, name) != value:
            raise UserError(f"--{name.replace('_', '-')} is {value} in {args.resume}: leave it "
                            "out, or start a new run")
    return args, checkpoint


# -- The device and an optimizer --------------------------------------------------------------


def pick_device(name, amp):
    """-> torch.device, and the dtype for autocast: bfloat16 if amp is wanted and a CUDA device has
    it, else float32 (no autocast). Raises UserError if the device `name` is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not {"cuda": torch.cuda, "mps": torch.backends.mps}[name].is_available():
        raise UserError(f"--device {name}: this machine (or this build of torch) has none")
    use_bf16 = name == "cuda" and amp and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(name), torch.bfloat16 if use_bf16 else torch.float32


def cuda_graph(step):
    """Record the kernels of step(*tensors) at the fourth call with tensors of these shapes, and
    replay them with a single launch: small kernels take longer to launch than to compute.

    step must not read a value back to the CPU, as .item() does. Anything kept between calls
    (weights, optimizer state, the learning rate) must be a CUDA tensor that is updated in place.
    Python numbers and branches are frozen when recorded. A replay overwrites the previous result.
    """
    calls, graphs = collections.Counter(), {}  # both by the tensors' shapes

    def replay(*tensors):
        shapes = tuple(tensor.shape for tensor in tensors)
        calls[shapes] += 1
        if calls[shapes] <= 3:  # optimizers make their state, and libraries get ready
            return step(*tensors)
        if shapes not in graphs:
            graph, inputs = torch.cuda.CUDAGraph(), [torch.empty_like(x) for x in tensors]
            with torch.cuda.graph(graph):  # records, and computes nothing
                result = step(*inputs)
            graphs[shapes] = graph, inputs, result
        graph, inputs, result = graphs[shapes]
        for recorded, new in zip(inputs, tensors, strict=True):
            recorded.copy_(new)
        graph.replay()
        return result
    return replay


def orthogonalize(matrices):
    """U V^T, nearly, for each matrix U S V^T of [n, rows, columns]. Five steps of Newton and
    Schulz's iteration with Jordan's coefficients keep the singular vectors. They bring most
    singular values to between 0.7 and 1.2."""
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x  # [n, short, long]: the products below are small
    for _ in range(5):
        xx = x @ x.mT  # [n, short, short]
        x = torch.baddbmm(x, 2.0315 * xx @ xx - 4.7750 * xx, x, beta=3.4445)  # 3.4445 x + ... @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates: all directions of a matrix get steps of the same size
    (Jordan et al., 2024, kellerjordan.github.io/posts/muon). Updates are scaled to the size of
    Adam's, so Adam's learning rates fit (Liu et al., 2025, arXiv:2502.16982). A convolution's
    kernel counts as a matrix [out, in * 9], that of a transposed convolution as [in, out * 9].
    (torch.optim.Muon takes no kernels, and is in bfloat16, which most CPUs only emulate.)"""

    def __init__(self, weights, lr, weight_decay, momentum=0.95):
        # A group for each shape: step() orthogonalizes the updates of a group together.
        by_shape = {w.shape: [v for v in weights if v.shape == w.shape] for w in weights}
        super().__init__([{"params": weights} for weights in by_shape.values()],
                         {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, updates = group["lr"], group["momentum"], []
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                state["mean"].lerp_(weight.grad, 1 - momentum)  # moving average of the gradients
                updates.append(weight.grad.lerp(state["mean"], momentum))  # Nesterov's momentum
            updates = orthogonalize(torch.stack(updates).flatten(2))  # [n, rows, columns]
            # Entries of U V^T are about 1 / sqrt(longer side), those of Adam's updates about 0.2.
            updates *= lr * 0.2 * math.sqrt(max(updates.shape[1:]))
            for weight, update in zip(group["params"], updates, strict=True):
                weight.mul_(1 - lr * group["weight_decay"])
                weight.sub_(update.reshape(weight.shape))


# -- Images -----------------------------------------------------------------------------------


def render_glyphs():
    """A stand-in for MNIST that needs no network: digits in matplotlib's own fonts, each distorted
    and shifted at random. -> uint8 images [70000, 1, 28, 28], labels [70000]"""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = sorted(path for path in Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVuS*")
                   if "Display" not in path.name)  # the two ...Display have no digits
    stamps = []  # [56, 56] each: digits 0 to 9 of the first font, then of the next
    for font, digit in itertools.product(fonts, "0123456789"):
        stamp = Image.new("L", (56, 56))
        ImageDraw.Draw(stamp).text((28, 28), digit, fill=255, anchor="mm",
                                   font=ImageFont.truetype(font, 48))
        stamps.append(np.asarray(stamp))
    stamps = torch.from_numpy(np.stack(stamps)).float().unsqueeze(1)  # [fonts * 10, 1, 56, 56]

    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(stamps), (70_000,), generator=generator)
    noise = torch.randn(70_000, 2, 3, generator=generator) * torch.tensor([0.12, 0.12, 0.06])
    # From coordinates of the image to those of its stamp; 1.1 makes the digit smaller.
    affine = torch.tensor([[1.1, 0, 0], [0, 1.1, 0]]) + noise
    images = []
    for part in torch.arange(70_000).split(5000):  # all at once would take gigabytes
        grid = F.affine_grid(affine[part], [len(part), 1, 28, 28], align_corners=False)
        images.append(F.grid_sample(stamps[choice[part]], grid, align_corners=False).byte())
    return torch.cat(images), choice % 10  # ten stamps a font


def read_dataset(name, data_dir):
    """-> the name (never "auto"); uint8 images [70000, 1, 28, 28], the last 10,000 for test;
    labels [70000]. Raises UserError if a file is damaged, or neither here nor on the network."""
    if name == "glyphs":
        return name, *render_glyphs()
    from torchvision import datasets  # slow, and not needed for --help

    dataset = getattr(datasets, DATASETS[name])
    raw = Path(data_dir, DATASETS[name], "raw")
    socket.setdefaulttimeout(15)  # seconds that a download waits for an answer
    try:
        train = dataset(data_dir, train=True, download=True)
        test = dataset(data_dir, train=False)
    except (RuntimeError, ValueError, AssertionError, TimeoutError) as error:
        if all((raw / file.removesuffix(".gz")).is_file() for file, _ in dataset.resources):
            raise UserError(f"a file in {raw} is damaged: delete this folder") from error
        reason = str(error).strip().rpartition("\n")[2]  # the last of several lines
        message = (f"{DATASETS[name]} is not in {raw}, and cannot be downloaded ({reason}): "
                   "run once online, or pass --data-dir, or --dataset glyphs")
        if name != "auto" or data_dir != os.path.abspath("data"):  # --dataset or --data-dir given
            raise UserError(message) from error
        print(f"warning: {message}. Now glyphs stand in.", file=sys.stderr)
        return "glyphs", *render_glyphs()
    images, labels = torch.cat([train.data, test.data]), torch.cat([train.targets, test.targets])
    return name.replace("auto", "mnist"), images.unsqueeze(1), labels


def read_pictures(folder, size):
    """Every picture below `folder` that Pillow reads, cut to a square. -> uint8 images
    [N, C, size, size], C = 1 if all are grey, else 3, and labels [N], a number for each folder"""
    from PIL import Image, ImageOps

    pictures, folders = [], []
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    for path in tqdm(paths, "reading", unit=" pictures", disable=None, leave=False):
        try:
            picture = ImageOps.exif_transpose(Image.open(path))
            if picture.mode.startswith("I"):  # 16-bit grey, which convert() would turn white
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture = ImageOps.fit(picture.convert("RGB"), (size, size))
        except Exception as error:  # Pillow has a dozen kinds for what is damaged or no picture
            tqdm.write(f"warning: {path} is left out ({error})", file=sys.stderr)
            continue
        pictures.append(np.asarray(picture))
        folders.append(str(path.parent))
    if len(pictures) < 10:
        raise UserError(f"--dataset {folder} is no dataset's name, nor a folder with ten pictures "
                        f"({len(pictures)} can be read)")
    images = torch.from_numpy(np.stack(pictures)).movedim(-1, 1)  # [N, 3, size, size]
    if (images == images[:, :1]).all():
        images = images[:, :1]  # grey
    return images, torch.from_numpy(np.unique(folders, return_inverse=True)[1])


def load_images(args, device):
    """Read the images of --dataset into memory. -> train, val and test, uint8 [N, C, H, W] on the
    device, and for the plots the labels of val, int64 [N] on the CPU. Puts into args what was read:
    dataset (no longer "auto"), image_size and num_images."""
    generator = torch.Generator().manual_seed(42)  # the same split whatever --seed is
    if os.path.isabs(args.dataset):  # a folder: add_image_arguments makes its path absolute
        images, labels = read_pictures(args.dataset, args.image_size or 32)
        order = torch.randperm(len(images), generator=generator)
        tenth = len(images) // 10
        sizes = [len(images) - 2 * tenth, tenth, tenth]
    else:
        args.dataset, images, labels = read_dataset(args.dataset, args.data_dir)
        order = torch.randperm(60_000, generator=generator)
        order = torch.cat([order, torch.arange(60_000, 70_000)])  # the test set stays what it is
        sizes = [54_000, 6_000, 10_000]
    if args.image_size not in (None, images.shape[-1]):
        raise UserError(f"--image-size is for own pictures; {args.dataset} has 28 x 28 pixels")
    if args.num_images not in (None, len(images)):
        raise UserError(f"{args.dataset} has {len(images)} images, not {args.num_images} as before")
    args.image_size, args.num_images = images.shape[-1], len(images)
    train, val, test = order.split(sizes)
    if args.limit:
        few = max(1, args.limit // 10)
        train, val, test = train[:args.limit], val[:few], test[:few]
    return *(images[part].to(device) for part in (train, val, test)), labels[val]


# -- Plots ------------------------------------------------------------------------------------


def prior_grid(size):
    """size x size points z of a plane. On each axis they lie at the quantiles (i + 0.5) / size of
    the prior N(0, 1). -> [size**2, 2], row by row: z[1] falls downwards, z[0] grows rightwards"""
    ticks = torch.special.ndtri((torch.arange(size) + 0.5) / size)  # the normal's inverse CDF
    z0, z1 = torch.meshgrid(ticks, ticks.flip(0), indexing="xy")
    return torch.stack([z0.flatten(), z1.flatten()], 1)


def ten_examples(labels):
    """-> the indices of up to ten images: the first of each label, then others"""
    firsts = [(labels == label).nonzero()[0].item() for label in labels.unique()]
    return torch.tensor([*dict.fromkeys([*firsts, *range(len(labels))])][:10])


def save_images(path, images, columns, padding=2):
    """Images [N, C, H, W] in [0, 1] as a grid with `columns`, each pixel as 2 x 2 dots"""
    from torchvision.utils import save_image

    save(path, lambda file: save_image(F.interpolate(images, scale_factor=2), file, format="png",
                                       nrow=columns, padding=padding, pad_value=0.5))


def save_scatter(path, z, labels):
    """Points z [N, 2], ten colours for their labels, and the prior's circles of 1, 2 and 3 sigma"""
    from matplotlib.figure import Figure  # slow; without pyplot no window opens

    reach = max(4, z.abs().quantile(0.99).item())  # a far point would make all others small
    figure = Figure(figsize=(6, 5.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="z[0]", ylabel="z[1]", aspect="equal",
                              xlim=(-reach, reach), ylim=(-reach, reach))
    points = axes.scatter(*z.T, c=labels % 10, s=2, cmap="tab10", vmin=0, vmax=9)
    angle = torch.linspace(0, 2 * math.pi, 200)
    for sigma in (1, 2, 3):
        axes.plot(sigma * angle.cos(), sigma * angle.sin(), "k", linewidth=1)
    axes.legend(*points.legend_elements(num=None), loc="center left", bbox_to_anchor=(1, 0.5))
    save(path, figure.savefig)


def save_curves(path, rows, columns, ylabel, x="epoch"):
    """Plot row[column] over row[x] for each of `columns`. The y-axis ignores the first row,
    whose values are so high that the rest would look flat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=ylabel)
    for name in columns:
        axes.plot([row[x] for row in rows], [row[name] for row in rows], marker=".",
                  label=f"{name} {rows[-1][name]:.4f}")
    later = [row[name] for name in columns for row in (rows[1:] or rows)]
    margin = 0.05 * (max(later) - min(later)) + 1e-4
    axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save(path, figure.savefig)
