"""What the scripts share and no model owns: the command line, device, optimizer, images, the run's
folder and its checkpoints, pictures. Nothing here is about a model: read vae.py first, and come
back for a name that it does not define."""

import argparse
import collections
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

# -- The command line and its errors ----------------------------------------------------------


class UserError(Exception):
    """A mistake that the person at the keyboard can put right; the message says how."""


@contextlib.contextmanager  # which also makes a decorator
def command(script):
    """A decorator for `main`. A UserError, or too little memory, ends the script in one line on
    standard error and status 2. Ctrl-C ends it in one line and status 130, and a reader of its
    output that went away (`| head`) ends it in silence."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed by 2>&-, or never there (pythonw)
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that it cannot encode becomes "?"
    try:
        yield
    except (UserError, RuntimeError) as error:
        message = str(error)
        if not isinstance(error, UserError):
            if not re.search("out of memory|allocate memory|not enough memory", message):
                raise
            message = ("there is not enough memory: choose a smaller model, or fewer images or "
                       f"texts at once ({message.splitlines()[0]})")
        print(f"{script}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; to go on with a training from its last checkpoint, pass "
              "--resume and its folder", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would fail: point it at the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help shows defaults, but not those that are None or False."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def number(kind, low, high=2**32 - 1):
    """An argparse type: an int or a float (`kind`) from low to high, so neither inf nor nan. The
    default of high is the largest seed: torch's generator on a CPU takes 32 bits of one."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value: 'two'"
    return parse


def add_run_arguments(parser, batch_size=None):
    """The flags that all training scripts have in common. Scripts that train on images pass the
    default of --batch-size, and get the flags that these have in common, too."""
    add = parser.add_argument
    if batch_size:
        add("--epochs", type=number(int, 1), default=20, help="passes over the training images")
        add("--batch-size", type=number(int, 1), default=batch_size, help="images per step")
        add("--dataset", choices=["auto", *TITLES], default="auto", help="auto takes mnist; where "
            "it is not there and cannot be downloaded, glyphs: digits drawn from fonts")
    add("--limit", type=number(int, 1), metavar="N", help="a quick try: the first N training "
        "images and N / 10 of validation and test, or the first N characters")
    add("--seed", type=number(int, 0), default=42, help="of weights, order of the data and noise")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="auto takes cuda, else mps, else cpu")
    add("--no-amp", action="store_true", help="no autocast to 16 bits (only CUDA has one)")
    add("--data-dir", default="data", metavar="DIR", help="where the data is or is downloaded to")
    add("--out-dir", metavar="DIR", help="the run's folder, if not one in runs/; gets a suffix "
        "where it already holds something")
    add("--resume", metavar="DIR", help="go on with the run in DIR under its own arguments; with "
        "nothing left to train, print its test figures")
    # load_checkpoint compares this: runs of another script, or of a version of this project whose
    # checkpoints hold something else, cannot be resumed.
    parser.set_defaults(script=f"{parser.prog}, format 4")


def parse_args(parser, argv, may_change):
    """-> the arguments, and with --resume the content of the run's last.pt, else None

    With --resume the run's own arguments are the defaults. Of the flags given beside it, those in
    `may_change`, and those that only say where and how to compute, may differ from them. Raises
    UserError for others.
    """
    args = parser.parse_args(argv)
    if args.resume is None:
        return args, None
    if args.out_dir is not None:
        raise UserError("--resume goes on in the run's own folder: leave out --out-dir")
    state = load_checkpoint(Path(args.resume, "last.pt"), args.script)
    parser.set_defaults(**state["args"])
    args = parser.parse_args(argv)
    may_change = {"resume", "device", "no_amp", "data_dir", *may_change}
    for name, value in state["args"].items():
        if name not in may_change and getattr(args, name) != value:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} does not fit the "
                            f"run, which has {value}: leave it out, or start a new run")
    return args, state


# -- The device -------------------------------------------------------------------------------


def pick_device(name, amp):
    """-> (torch.device, dtype of the autocast): bfloat16 or float16 on CUDA, else float32.

    Raises UserError where the device that `name` asks for is not there.
    """
    # In the order that "auto" prefers
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                "cpu": True}
    if name == "auto":
        name = next(device for device in is_there if is_there[device])
    if not is_there[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch) has none; "
                        "--device auto takes what is there")
    dtype = torch.float32
    if name == "cuda" and amp:
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated it is slow
        dtype = torch.bfloat16 if native else torch.float16
    return torch.device(name), dtype


def cuda_graph(step):
    """-> a faster `step`: its kernels are recorded for each shape of x, and from then on launched
    all at once. (A small network's step is hundreds of kernels, which take longer to launch one by
    one than to compute.) The tensor that it returns is overwritten by its next call.

    step(x), x on CUDA, must not read a value back, as .item() and .cpu() do. What it keeps between
    calls (weights, optimizers' state, the learning rate) has to be CUDA tensors that it changes in
    place; numbers and branches of Python stay as recorded. Gradients are made and dropped in it.
    """
    calls, graphs = collections.Counter(), {}  # by the shape of x

    def replay(x):
        calls[x.shape] += 1
        if calls[x.shape] <= 3:  # first, optimizers make their state, and libraries get ready
            return step(x)
        if x.shape not in graphs:
            graph, own_x = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph):  # records, and computes nothing
                result = step(own_x)
            graphs[x.shape] = graph, own_x, result
        graph, own_x, result = graphs[x.shape]
        own_x.copy_(x)
        graph.replay()
        return result
    return replay


# -- An optimizer -----------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, so that a matrix learns in all directions alike
    (Jordan et al., 2024, kellerjordan.github.io/posts/muon). They are scaled to the size of Adam's
    updates, so the same learning rates fit (Liu et al., 2025, arXiv:2502.16982). The kernel of a
    convolution, [out, in, 3, 3], counts as a matrix [out, in * 9]; if transposed, [in, out * 9].

    Why not torch.optim.Muon: it takes only matrices, and computes in bfloat16, which takes 20 times
    as long on the many CPUs that only emulate it.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        # A group per shape, whose matrices are made orthogonal in one batch
        by_shape = {p.shape: [q for q in matrices if q.shape == p.shape] for p in matrices}
        super().__init__([{"params": group} for group in by_shape.values()],
                         {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, weights = group["lr"], group["momentum"], group["params"]
            gradients = torch.stack([w.grad.flatten(1) for w in weights])  # [n, rows, columns]
            state = self.state[weights[0]]  # of the whole group
            if not state:
                state["mean"] = torch.zeros_like(gradients)
            state["mean"].lerp_(gradients, 1 - momentum)
            # Nesterov's momentum: momentum * mean + (1 - momentum) * gradients
            updates = orthogonalize(gradients.lerp(state["mean"], momentum))
            # The entries of U V^T have a root mean square of 1 / sqrt(longer side), those of Adam's
            # updates about 0.2.
            updates *= lr * 0.2 * math.sqrt(max(gradients.shape[1:]))
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(1 - lr * group["weight_decay"])
                weight.sub_(update.view(weight.shape))


def orthogonalize(matrices):
    """U V^T, nearly, for each matrix U S V^T of [n, rows, columns]: the five steps (Newton and
    Schulz's iteration, Jordan's coefficients) leave the singular vectors as they are, and bring
    most singular values to between 0.7 and 1.2."""
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x  # [n, less, more], so that the products below are small
    identity = torch.eye(x.size(1), device=x.device, dtype=x.dtype)
    for _ in range(5):
        xx = x @ x.mT  # [n, less, less]
        x = (3.4445 * identity - 4.7750 * xx + 2.0315 * xx @ xx) @ x
    return x.mT if tall else x


# -- Images -----------------------------------------------------------------------------------

# The names of --dataset -> torchvision's names of its classes and folders
TITLES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "glyphs": "glyphs"}
RAW_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_MD5 = "df934f9eb93f7ea5d223226cfb084043"  # of the pixels of all 70,000 images
TIMEOUT = 15  # seconds that a download waits for an answer


def load_mnist(dataset, data_dir, limit, device):
    """Read MNIST, or the dataset of 28x28 images that --dataset names, into memory.

    -> its name; train, val and test, uint8 [N, 1, 28, 28] on the device; val_labels and
    test_labels, int64 [N] on the CPU. A fixed permutation splits the 60,000 training images into
    54,000 and 6,000 for validation. Raises UserError for damaged files, and for a dataset asked
    for by name that cannot be had.
    """
    name = "mnist" if dataset == "auto" else dataset
    try:
        images, labels = draw_glyphs() if name == "glyphs" else read_images(name, Path(data_dir))
    except ConnectionError as error:
        if dataset != "auto":
            raise UserError(f"{error}: run once online, or pass --dataset glyphs") from error
        print(f"warning: {error}: using the built-in glyphs instead", file=sys.stderr)
        return load_mnist("glyphs", data_dir, limit, device)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(42))
    train, val, test = order[:54_000], order[54_000:], torch.arange(60_000, 70_000)
    if limit:
        few = max(2, limit // 10)  # a distribution needs two
        train, val, test = train[:limit], val[:few], test[:few]
    return SimpleNamespace(name=name, train=images[train].to(device), val=images[val].to(device),
                           val_labels=labels[val], test=images[test].to(device),
                           test_labels=labels[test])


def read_images(name, data_dir):
    """-> images [70000, 1, 28, 28] and labels [70000], the 10,000 of the test set last

    Raises UserError for damaged files (for MNIST each pixel is checked, else the sizes), and
    ConnectionError where there are none to be had.
    """
    title, timeout = TITLES[name], socket.getdefaulttimeout()
    raw = data_dir / title / "raw"
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder")
    try:
        from torchvision import datasets  # not above: glyphs work without it

        if not all((raw / file).is_file() for file in RAW_FILES):
            # Download into a temporary folder, so that a download which breaks off leaves nothing.
            # Copy what is there into it: torchvision unpacks a .gz instead of downloading it.
            parent = next(p for p in (data_dir, *data_dir.absolute().parents) if p.is_dir())
            socket.setdefaulttimeout(TIMEOUT)
            with (tempfile.TemporaryDirectory(dir=parent) as temporary,
                  contextlib.redirect_stdout(sys.stderr)):  # where older torchvisions print
                new = Path(temporary, title, "raw")
                if raw.is_dir():
                    shutil.copytree(raw, new)
                getattr(datasets, title)(temporary, download=True)
                raw.mkdir(parents=True, exist_ok=True)
                for file in RAW_FILES:
                    os.replace(new / file, raw / file)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"{title} is not in {raw} ({', '.join(RAW_FILES)}, or these as .gz) "
                              f"and could not be downloaded ({reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)
    try:
        train, test = (getattr(datasets, title)(data_dir, flag) for flag in (True, False))
        images = torch.cat([train.data, test.data]).view(70_000, 1, 28, 28)
        labels = torch.cat([train.targets, test.targets]).view(70_000)
        intact = name != "mnist" or hashlib.md5(images.numpy()).hexdigest() == MNIST_MD5
    except Exception:  # torchvision's parser raises whatever it comes upon
        intact = False
    if not intact:
        raise UserError(f"a file in {raw} is damaged: delete this folder to download it again")
    return images, labels


def draw_glyphs():
    """A stand-in for MNIST that needs no network: digits in matplotlib's own fonts, each turned,
    slanted, scaled and shifted at random; always the same 70,000 images.

    -> images [70000, 1, 28, 28], labels [70000]
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fonts = sorted(path for path in Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVuS*")
                   if "Display" not in path.name)  # the two ...Display have no digits
    stamps = []  # [56, 56] each: digits 0 to 9 of the first font, then of the next
    for font, digit in itertools.product(fonts, "0123456789"):
        canvas = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=56))
        canvas.figure.text(0.5, 0.5, digit, size=62, font=font, ha="center", va="center")
        canvas.draw()
        stamps.append(255 - np.asarray(canvas.buffer_rgba())[..., 0])
    stamps = torch.from_numpy(np.stack(stamps)).float().unsqueeze(1)  # [fonts * 10, 1, 56, 56]

    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(stamps), (70_000,), generator=generator)
    noise = torch.randn(70_000, 2, 3, generator=generator) * torch.tensor([0.12, 0.12, 0.06])
    # Where in its stamp a pixel of an image lies: [[scale, slant, shift], [slant, scale, shift]].
    affine = torch.tensor([[1.1, 0, 0], [0, 1.1, 0]]) + noise
    images = torch.empty(70_000, 1, 28, 28, dtype=torch.uint8)
    for part in torch.arange(70_000).split(5000):
        grid = F.affine_grid(affine[part], [len(part), 1, 28, 28], align_corners=False)
        images[part] = F.grid_sample(stamps[choice[part]], grid, align_corners=False).byte()
    return images, choice % 10


# -- The run's folder and its checkpoints -----------------------------------------------------


def new_run_folder(path, args):
    """Make the folder `path`, or path-2, path-3, ... where it already holds something. -> its path

    Of two runs that want the same folder at once, the one that creates its args.json gets it.
    """
    path = Path(path)
    if path.name in ("", ".."):  # "." and "..": no name that a suffix could follow
        path = path.resolve()
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        folder = Path(f"{path}{suffix}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                with open(folder / "args.json", "x", encoding="utf-8") as file:
                    file.write(json.dumps(vars(args), indent=2) + "\n")
                return folder
        except FileExistsError:  # `folder` is a file, or another run created args.json
            continue
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be made ({error.strerror}): "
                            "pass another --out-dir") from error


def open_run(args, state, name, done, total="epochs"):
    """-> the run's folder: a new one, or with --resume the old one. state: its last.pt, or None

    done: how many of args.`total` are trained. If there is something left, args.json and last.pt
    take the arguments given now.
    """
    if state is None:
        return new_run_folder(args.out_dir or f"runs/{name}", args)
    run, new, old = Path(args.resume), getattr(args, total), state["args"][total]
    if new > done:
        if new != old:
            print(f"{new:,} {total.replace('_', ' ')} instead of {old:,}: the learning rate "
                  f"{'rises again' if new > old else 'falls'} to its place in the new schedule")
        (run / "test.json").unlink(missing_ok=True)  # of the run as it was
        save_checkpoint(run / "last.pt", state | {"args": vars(args)})
        write_json(run / "args.json", vars(args), indent=2)
    return run


def close_run(args, run, rows, figures, done, total="epochs"):
    """Write test.json, if all of the run is trained and it is not there yet."""
    # Not args, whose total is smaller where --resume only looks at a run:
    planned = load_checkpoint(run / "last.pt", args.script)["args"][total]
    if done == planned and not (run / "test.json").exists():
        write_json(run / "metrics.jsonl", *rows)  # a kill may have come between last.pt and this
        write_json(run / "test.json", figures | {"seconds": rows[-1]["seconds"],
                                                 "torch": torch.__version__}, indent=2)


def save(path, write):
    """Let write(file) write to a temporary file, which then replaces `path`: whole or not at all.

    Raises UserError where that fails, on a full disk say.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # On a full disk torch.save raises a RuntimeError, whose context is the OSError.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"{path} cannot be written ({reason.strerror}); what was there before "
                        "is untouched") from error


def write_json(path, *rows, indent=None):
    """Each of `rows` as JSON, one after another."""
    text = "".join(json.dumps(row, indent=indent) + "\n" for row in rows)
    save(path, lambda file: file.write(text.encode("utf-8")))


def save_checkpoint(path, state):
    """Write a dict of tensors and plain Python values: "model" (its weights), "args" and more.

    Raises UserError where weights are inf or nan, or where the file cannot be written.
    """
    if not all(weights.isfinite().all() for weights in state["model"].values()):
        raise UserError("the weights are no longer finite: start again with a lower learning rate "
                        f"(what {path.parent} holds is from before)")
    save(path, lambda file: torch.save(state, file))


def load_checkpoint(path, script):
    """Read what save_checkpoint wrote. -> the dict, its tensors on the CPU

    Raises UserError where the file is missing, damaged, or written by another script.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # with checksums, which torch.load ignores
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        writer = state["args"]["script"]
    except Exception as error:  # a dozen kinds, from FileNotFoundError to UnpicklingError
        raise UserError(f"{path} is missing or damaged ({' '.join(str(error).split())}): put a "
                        "copy of it back, or start a new run") from error
    if writer != script:
        raise UserError(f"{path} was written by {writer}, not by {script}")
    return state


# -- Pictures ---------------------------------------------------------------------------------


@contextlib.contextmanager
def picture(path, width, height, title):
    """`with picture(...) as figure:` draw; the figure (in inches) is saved at the block's end."""
    from matplotlib.figure import Figure  # here, as it is slow; without pyplot, so no window

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize="medium", parse_math=False)  # a folder's name may hold a $
    yield figure
    save(path, lambda file: figure.savefig(file, format="png"))


def prior_grid(size):
    """size x size points z of a plane, at the percentiles (i + 0.5) / size of the prior N(0, 1) of
    each axis. -> [size**2, 2], in rows from the top (highest z[1]), each from the lowest z[0]"""
    ticks = torch.special.ndtri((torch.arange(size) + 0.5) / size)  # the normal's inverse CDF
    z0, z1 = torch.meshgrid(ticks, ticks.flip(0), indexing="xy")
    return torch.stack([z0.flatten(), z1.flatten()], 1)


def one_of_each(images, labels):
    """The first image of each label. -> [10, 1, 28, 28], or fewer where a label has none"""
    first = [(labels == label).nonzero()[0, 0] for label in labels.unique()]
    return images[torch.stack(first).to(images.device)]


def tile(images, columns, gap=1):
    """[N, 1, H, W] in [0, 1] -> one image of N / columns rows, `gap` grey pixels between them"""
    padded = F.pad(images.squeeze(1), (gap, 0, gap, 0), value=0.5)  # [N, gap + H, gap + W]
    rows = [torch.cat([*row], 1) for row in padded.split(columns)]
    return torch.cat(rows)[gap:, gap:]


def save_image(path, image, title):
    """One grey-scale image [H, W] in [0, 1]."""
    height, width = image.shape
    # At 120 dots an inch (see above) a pixel becomes 2 x 2 dots; 0.6 inches are for the title.
    with picture(path, width / 60, height / 60 + 0.6, title) as figure:
        axes = figure.add_subplot()
        axes.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()


def save_scatter(path, z, labels, title):
    """Points z [N, 2] coloured by label, and circles at 1, 2 and 3 sigma of the prior N(0, I)."""
    reach = max(4, z.abs().max().item())
    with picture(path, 6, 6, title) as figure:
        axes = figure.add_subplot(xlabel="z[0]", ylabel="z[1]", aspect="equal",
                                  xlim=(-reach, reach), ylim=(-reach, reach))
        points = axes.scatter(*z.T, c=labels, s=2, cmap="tab10", vmin=0, vmax=9)
        angle = torch.linspace(0, 2 * math.pi, 200)
        for sigma in (1, 2, 3):
            axes.plot(sigma * angle.cos(), sigma * angle.sin(), "k", linewidth=1)
        figure.legend(*points.legend_elements(), loc="outside right center")


def save_curves(path, title, ylabel, rows, curves, levels, x="epoch"):
    """Columns of `rows` over the column x. curves: label -> column; levels: label -> the height of
    a dashed line. The first row, if there is another, is not drawn: it is a mean with the untrained
    model in it, and would squash the rest."""
    rows = rows[1:] or rows
    with picture(path, 7, 4, title) as figure:
        axes = figure.add_subplot(xlabel=x, ylabel=ylabel)
        for label, name in curves.items():
            axes.plot([row[x] for row in rows], [row[name] for row in rows], marker=".",
                      label=f"{label} {rows[-1][name]:.4f}")
        for label, height in levels.items():
            axes.axhline(height, color="k", linestyle="--", label=f"{label} {height:.4f}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2)
