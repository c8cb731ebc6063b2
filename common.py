"""What vae.py, aae.py and gpt.py share: the device, an optimizer, images, files, flags and plots.
Read vae.py first, and come here for a name that it does not define."""

import argparse
import contextlib
import itertools
import json
import math
import os
import socket
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the person at the keyboard can put right; the message says how."""


# -- The device and an optimizer --------------------------------------------------------------


def pick_device(name, amp):
    """-> torch.device, and the dtype for autocast: bfloat16 if amp is wanted and a CUDA device has
    it, else float32 (no autocast). Raises UserError if the device `name` is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not {"cuda": torch.cuda, "mps": torch.backends.mps}[name].is_available():
        raise UserError(f"--device {name}: this machine (or this build of torch) has none")
    torch.set_flush_denormal(True)  # on a CPU numbers below 1e-38 take many times longer
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have by default
    use_bf16 = name == "cuda" and amp and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.device(name), torch.bfloat16 if use_bf16 else torch.float32


def cuda_graph(step):
    """Record the kernels of step(*tensors) at the fourth call with tensors of these shapes, and
    replay them with a single launch: small kernels take longer to launch than to compute.

    step returns a tensor, and must not read a value back to the CPU, as .item() does. Its Python
    runs in the first four calls only; then numbers and branches are frozen. What it keeps between
    calls (weights, the learning rate) must be in CUDA tensors that are updated in place.
    """
    calls, graphs = {}, {}  # both by the tensors' shapes

    def replay(*tensors):
        shapes = tuple(tensor.shape for tensor in tensors)
        calls[shapes] = calls.get(shapes, 0) + 1
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
        return result.clone()  # the next replay overwrites result
    return replay


def orthogonalize(x):
    """U V^T, nearly, for a matrix x = U S V^T [rows, columns]. Five steps of Newton and Schulz's
    iteration with Jordan's coefficients keep the singular vectors, and bring most singular values
    to between 0.7 and 1.2."""
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x  # [short, long]: the products below are small
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        xx = x @ x.mT  # [short, short]
        x = torch.addmm(x, torch.addmm(xx, xx, xx, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates: all directions of a matrix get steps of the same size
    (Jordan et al., 2024, kellerjordan.github.io/posts/muon). Updates are scaled to the size of
    Adam's, so Adam's learning rates fit (Liu et al., 2025, arXiv:2502.16982). A kernel [n, m,
    3, 3] counts as a matrix [n, m * 9]. A parameter with three dimensions is no matrix: give it to
    Adam. (torch.optim.Muon takes no kernels, and is in bfloat16, which most CPUs only emulate.)"""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        """closure() computes the loss and its gradients. -> the loss, or None without closure"""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for weight in [w for w in group["params"] if w.grad is not None]:
                state, momentum = self.state[weight], group["momentum"]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                state["mean"].lerp_(weight.grad, 1 - momentum)  # moving average of the gradients
                update = weight.grad.lerp(state["mean"], momentum)  # Nesterov's momentum
                update = orthogonalize(update.flatten(1))
                # Entries of U V^T are about 1 / sqrt(longer side), those of Adam's updates 0.2
                update *= group["lr"] * 0.2 * math.sqrt(max(update.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view_as(weight))
        return loss


# -- Images -----------------------------------------------------------------------------------

# --dataset -> the name of torchvision's class, which is also the name of its folder
DATASETS = {"auto": "MNIST", "mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST",
            "glyphs": None}  # render_glyphs


def render_glyphs():
    """A stand-in for MNIST that needs no network: digits in matplotlib's own fonts, each distorted
    and shifted at random. -> uint8 images [70000, 1, 28, 28], labels [70000]"""
    import matplotlib  # slow, and not needed for --help
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
    # From coordinates of the image to those of its stamp; 1.1 makes the digit smaller.
    affine = torch.tensor([[1.1, 0, 0], [0, 1.1, 0]]) + torch.tensor(
        [0.12, 0.12, 0.06]) * torch.randn(70_000, 2, 3, generator=generator)
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
    from torchvision import datasets

    raw = Path(data_dir, DATASETS[name], "raw")
    socket.setdefaulttimeout(15)  # seconds that a download waits for an answer
    try:
        train, test = (getattr(datasets, DATASETS[name])(data_dir, train=part, download=True)
                       for part in (True, False))
    except (RuntimeError, ValueError, AssertionError, TimeoutError) as error:
        reason = str(error).strip().rpartition("\n")[2]  # the last of several lines
        message = (f"{raw} cannot be read or downloaded ({reason}): delete it if it is there, and "
                   "run once online, or pass --data-dir, or --dataset glyphs")
        # Glyphs stand in only if nobody named a dataset or a folder, and nothing is there.
        if name != "auto" or data_dir != os.path.abspath("data") or any(raw.glob("*-ubyte")):
            raise UserError(message) from error
        print(f"warning: {message}. Now glyphs stand in.", file=sys.stderr)
        return "glyphs", *render_glyphs()
    images, labels = torch.cat([train.data, test.data]), torch.cat([train.targets, test.targets])
    return name.replace("auto", "mnist"), images.unsqueeze(1), labels


def read_pictures(folder, size):
    """Every picture below `folder` that Pillow reads, cut to a square. -> uint8 images
    [N, C, size, size], C = 1 if all are grey, else 3; labels [N], a number for each folder; a
    checksum of the files' names and sizes"""
    from PIL import Image, ImageOps

    paths, entered = [], {}  # each real folder, once (links may form a loop) -> the path to it
    for parent, folders, files in os.walk(folder, followlinks=True):
        first = entered.setdefault(os.path.realpath(parent), parent) == parent
        folders[:] = sorted(name for name in folders if first and name[0] != ".")  # not hidden
        paths += [Path(parent, name) for name in files if first and name[0] != "."]
    pictures, read = [], []
    for path in tqdm(sorted(paths), "reading", unit=" pictures", disable=None, leave=False):
        try:
            picture = ImageOps.exif_transpose(Image.open(path))
            if picture.mode.startswith("I;16"):  # 16-bit grey, which convert() would turn white
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise ValueError(f"mode {picture.mode} does not say which value is white")
            picture = ImageOps.fit(picture.convert("RGBA"), (size, size))
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            pictures.append(np.asarray(picture.convert("RGB")))
            read.append((path.relative_to(folder).as_posix(), path.stat().st_size))
        except Exception as error:  # Pillow has a dozen kinds for what is damaged or no picture
            tqdm.write(f"warning: {path} is left out ({error})", file=sys.stderr)
    if len(pictures) < 10:
        raise UserError(f"--dataset {folder}: no dataset, nor a folder with ten readable pictures")
    images = torch.from_numpy(np.stack(pictures)).movedim(-1, 1)  # [N, 3, size, size]
    if (images == images[:, :1]).all():
        images = images[:, :1]  # grey
    _, labels = np.unique([os.path.dirname(name) for name, _ in read], return_inverse=True)
    return images, torch.from_numpy(labels), zlib.crc32(repr(read).encode())


def load_images(args, device):
    """Read the images of --dataset into memory. -> train, val and test, each a pair on the device:
    uint8 images [N, C, H, W], and their labels, int64 [N]. Puts into args what was read: dataset
    (no longer "auto"), image_size, checksum. Raises UserError if a resumed run had other images."""
    generator = torch.Generator().manual_seed(42)  # the same split whatever --seed is
    if args.dataset in DATASETS:
        args.dataset, images, labels = read_dataset(args.dataset, args.data_dir)
        checksum = zlib.crc32(args.dataset.encode())
        order = torch.cat([torch.randperm(60_000, generator=generator),  # shuffles each part
                           torch.randperm(10_000, generator=generator) + 60_000])
        sizes = [54_000, 6_000, 10_000]
    else:
        images, labels, checksum = read_pictures(args.dataset, args.image_size or 32)
        order = torch.randperm(len(images), generator=generator)
        tenth = len(images) // 10
        sizes = [len(images) - 2 * tenth, tenth, tenth]
    if getattr(args, "checksum", checksum) != checksum:  # of a resumed run
        raise UserError(f"--dataset {args.dataset}: not the images with which the run began")
    if args.image_size not in (None, images.shape[-1]):
        raise UserError(f"--image-size is for own pictures; {args.dataset} has 28 x 28 pixels")
    args.checksum, args.image_size = checksum, images.shape[-1]
    train, val, test = order.split(sizes)
    if args.limit:
        few = max(1, args.limit // 10)
        train, val, test = train[:args.limit], val[:few], test[:few]
    return [(images[part].to(device), labels[part].to(device)) for part in (train, val, test)]


# -- Files and checkpoints --------------------------------------------------------------------


def save(path, write):
    """Let write(file) fill a temporary file, then rename it to `path`, which is always whole."""
    temporary = Path(f"{path}.{os.urandom(8).hex()}.tmp")  # others may save the same file
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
    save(path, lambda file: file.writelines(
        json.dumps(row, indent=indent).encode() + b"\n" for row in rows))


def check_finite(model, row):
    """Raise UserError if a weight is nan (masks may have inf), or a result in the dict `row` nan or
    inf. Call it before the model and the row are saved."""
    bad = [name for name, tensor in model.state_dict().items() if tensor.isnan().any()]
    bad += [name for name, value in row.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"{bad[0]} is no longer finite: start again with a lower learning rate")


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain Python values, with "args" (a dict) and more."""
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
        folder = Path(f"{path}-{i}" if i > 1 else path)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another run's: try the next name
            open(folder / "args.json", "x").close()  # the script fills it
            return folder


# -- The command line -------------------------------------------------------------------------


def run_script(main):
    """Call main(). A UserError, or an error of the system, ends in one line and status 2."""
    os.environ["MPLBACKEND"] = "agg"  # the value of a notebook breaks matplotlib
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot, and need not
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    script = Path(sys.argv[0]).name
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped", file=sys.stderr)
        sys.exit(130)


def number(kind, low, high=2**31):
    """An argparse type: an int or a float (`kind`) from low to high, so neither inf nor nan."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value: 'two'"
    return parse


def absolute_path(text):
    """An argparse type: the absolute path of a file or folder, also of ~/name; "" stays as it is"""
    return os.path.abspath(os.path.expanduser(text)) if text else ""


def add_image_flags(parser, batch_size):
    """The flags of the scripts that train on images"""
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=20, help="passes over the training images")
    add("--batch-size", type=number(int, 1), default=batch_size, help="images per step")
    add("--optimizer", choices=["muon", "adam"], default="muon", help="for matrices and kernels")
    add("--dataset", type=lambda text: text if text in DATASETS else absolute_path(text),
        default="auto", metavar="|".join([*DATASETS, "DIR"]), help="auto: mnist, or glyphs (digits "
        "drawn from fonts) if it is neither here nor online; DIR: all pictures below your folder")
    add("--image-size", type=number(int, 8), metavar="N", help="own pictures are cut to squares "
        "and scaled to N x N pixels (32 if not given)")


def add_run_flags(parser):
    """The flags of all scripts that train"""
    add = parser.add_argument
    add("--limit", type=number(int, 1), metavar="N", help="a quick try: N training images, "
        "N / 10 to validate and N / 10 to test; or the first N characters of a text")
    add("--seed", type=number(int, 0), default=42, help="for weights, data order and noise")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto takes cuda if it is there, else cpu (never mps)")
    add("--no-amp", action="store_true", help="turn off autocast to 16 bits (CUDA only)")
    add("--data-dir", type=absolute_path, default="data", metavar="DIR", help="keeps the data")
    add("--out-dir", type=absolute_path, metavar="DIR", help="the run's folder, instead of one in "
        "runs/; gets a suffix if it already holds a run")
    add("--resume", type=absolute_path, metavar="DIR", help="go on with the run in this folder")
    parser.set_defaults(script=parser.prog)  # so that load_checkpoint knows who made a file


def parse_args(parser, argv, may_change):
    """-> the arguments, and with --resume the checkpoint last.pt, else None. With --resume the
    run's own arguments are the defaults. Raises UserError for another value of any argument but
    --device, --no-amp, --data-dir, --dataset (the same images) and those in may_change."""
    args = parser.parse_args(argv)
    if args.resume is None:
        return args, None
    checkpoint = load_checkpoint(Path(args.resume, "last.pt"), script=parser.prog)
    parser.set_defaults(**checkpoint["args"])
    args = parser.parse_args(argv)
    allowed = {"resume", "device", "no_amp", "data_dir", "dataset", *may_change}
    for name, value in checkpoint["args"].items():
        if name not in allowed and getattr(args, name) != value:
            raise UserError(f"--{name.replace('_', '-')} is {value} in {args.resume}: leave it "
                            "out, or start a new run")
    return args, checkpoint


# -- Plots ------------------------------------------------------------------------------------


def prior_grid(size):
    """size x size points z of a plane. On each axis they lie at the quantiles (i + 0.5) / size of
    N(0, 1). -> [size**2, 2], row by row: z[1] falls downwards, z[0] grows rightwards"""
    ticks = torch.special.ndtri((torch.arange(size) + 0.5) / size)  # the normal's inverse CDF
    return torch.cartesian_prod(ticks.flip(0), ticks).flip(1)


def save_images(path, images, columns, padding=2):
    """Images [N, C, H, W] in [0, 1] as a grid with `columns`, each pixel as 2 x 2 dots"""
    from torchvision.utils import save_image

    save(path, lambda file: save_image(F.interpolate(images, scale_factor=2), file, format="png",
                                       nrow=columns, padding=padding, pad_value=0.5))


def save_scatter(path, z, labels):
    """The first and the last dimension of points z [N, z_dim], in ten colours for their labels, and
    circles of 1, 2 and 3 sigma of N(0, I)"""
    from matplotlib.figure import Figure  # without pyplot no window opens

    figure = Figure(figsize=(3.6, 3), dpi=200)
    axes = figure.add_subplot(xlabel="z[0]", ylabel=f"z[{z.shape[1] - 1}]", aspect="equal")
    points = axes.scatter(*z[:, [0, -1]].T.cpu(), c=labels.cpu() % 10, s=1, cmap="tab10", vmin=0,
                          vmax=9)
    angle, sigma = torch.linspace(0, 2 * math.pi, 200).unsqueeze(1), torch.tensor([1, 2, 3])
    axes.plot(sigma * angle.cos(), sigma * angle.sin(), "k", linewidth=1)  # [200, 3]
    axes.locator_params(nbins=5)
    axes.legend(*points.legend_elements(num=None), loc="center left", bbox_to_anchor=(1, 0.5))
    save(path, lambda file: figure.savefig(file, bbox_inches="tight"))  # or the labels are cut


def save_curves(path, rows, columns, ylabel, x="epoch"):
    """Plot row[column] over row[x] for each of `columns`. If there are many rows, the y-axis
    ignores the first, whose values are so high that the rest would look flat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=180, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=ylabel)
    for name in columns:
        axes.plot([row[x] for row in rows], [row[name] for row in rows], marker=".",
                  label=f"{name} {rows[-1][name]:.4f}")
    if len(rows) > 5:
        axes.set_ylim(top=1.02 * max(row[name] for name in columns for row in rows[1:]))
    axes.locator_params("x", nbins=6, integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save(path, figure.savefig)
