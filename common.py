"""What the scripts share and no model owns.

Errors that a person can act on · device and precision · seeds · images in memory ·
the run folder, its metrics and its checkpoints · pictures. There is nothing here to learn
about a model: read vae.py first, and come here for a name that it does not define.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import signal
import socket
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------
# The command line


class UserError(Exception):
    """Something the person at the keyboard can put right; the message says how."""


@contextlib.contextmanager
def command(script):
    """Decorate a script's `main`: a mistake ends in one line on stderr and exit status 2.

    Ctrl-C exits with 130, and a reader that went away (`| head`) ends the script quietly.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Python flushes stdout once more on its way out; give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        if not any(words in reason for words in (  # torch's, on a GPU, on Linux and on Windows
                "out of memory", "allocate memory", "not enough memory")):
            raise
        print(f"{script}: error: there is not enough memory ({reason}): choose a smaller model or "
              "--batch-size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)


def integer(minimum):
    """An argparse type: an integer of at least `minimum`."""

    def parse(text):
        if not minimum <= (value := int(text)) < 2**63:
            raise argparse.ArgumentTypeError(f"{value} is out of range (from {minimum})")
        return value

    parse.__name__ = "integer"  # argparse says "invalid integer value: 'two'"
    return parse


def positive(text):
    """An argparse type: a finite number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def number(minimum, maximum=float("inf")):
    """An argparse type: a finite number from `minimum` to `maximum`, both of which it may be."""

    def parse(text):
        if not minimum <= (value := float(text)) <= maximum or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value: 'two'"
    return parse


def parse_run_args(parser, argv, run_args):
    """parser.parse_args(argv) over `run_args`, the arguments of a run that goes on or is looked
    at again: beside --resume or --eval only --device, --data-dir and --text may be given."""
    argv = sys.argv[1:] if argv is None else argv
    run_args = argparse.Namespace(**run_args | {"resume": None, "eval": None}) if run_args else None
    args = parser.parse_args(argv, run_args)
    given = [word.split("=")[0] for word in argv if word.startswith("--")]
    for flag in {"--resume", "--eval"}.intersection(given):
        if others := set(given) - {flag, "--device", "--data-dir", "--text"}:
            parser.error(f"{flag} keeps the run's own arguments: leave out {' '.join(others)}")
    return args


class StopRequest:
    """Within the `with` block Ctrl-C and SIGTERM only set `asked`, which the loop reads after
    each step; a second Ctrl-C acts at once."""

    def __enter__(self):
        self.asked = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, signum, frame):
        self.asked = True
        self.__exit__()

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------
# Device, precision, seeds


def pick_device(name, amp):
    """-> (torch.device, dtype of the autocast): bfloat16 or float16 on CUDA, else float32.

    Raises UserError where the device that `name` asks for is not there.
    """
    # In training ever more activations and gradients come to lie below 1e-38, where a CPU
    # computes many times more slowly: such numbers are taken for zero. Threads inherit the mode
    # from the one that starts them, so it is set before torch has computed anything.
    torch.set_flush_denormal(True)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if not there[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch) has none; "
                        "--device auto takes what is there")
    dtype = torch.float32
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; cuDNN's convolutions have it already
        if amp:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if native else torch.float16
    return torch.device(name), dtype


def seed_for(*numbers):
    """A seed of its own for numbers such as (seed, step); zeros at their end do not count. With
    their sum, seed 1 would see at step 0 what seed 0 sees at step 1."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_step(device, *numbers):
    """Start the random numbers of `device` anew, from seed_for(*numbers)."""
    if device.type == "cpu":  # torch.manual_seed takes 0.4 ms to note it for absent devices, too
        torch.default_generator.manual_seed(seed_for(*numbers))
    else:
        torch.manual_seed(seed_for(*numbers))


def epoch_order(num_images, seed, epoch, device):
    """The order in which `epoch` visits the images, the same on every device. -> [num_images]"""
    # The 1 tells it from the seed of step number `epoch`.
    generator = torch.Generator().manual_seed(seed_for(seed, epoch, 1))
    return torch.randperm(num_images, generator=generator).to(device)


# ---------------------------------------------------------------------------------------------
# Images

# The unpacked files of MNIST and of the datasets in its format: MD5 (of MNIST's alone) and shape.
RAW_FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", (60_000,)),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", (10_000,)),
}
# torchvision's names: of the classes, of the folders that they download to, and in our titles
TITLES = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST"}
DATASETS = [*TITLES, "glyphs"]
TIMEOUT = 15  # seconds that a download waits for an answer


class Images(NamedTuple):
    """A dataset in memory: uint8 images [N, 1, 28, 28] on the device, labels [N] on the CPU."""
    name: str
    train: torch.Tensor
    val: torch.Tensor
    val_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load_mnist(dataset, data_dir, limit, device):
    """Read MNIST, or the like of it that `dataset` names (see DATASETS), into memory. -> Images

    With `dataset` None it is MNIST, and the built-in glyphs only where MNIST can be neither found
    nor downloaded. Training images are split 54,000 / 6,000 by a fixed permutation.
    Raises UserError for damaged files, and for a named dataset that cannot be had.
    """
    try:
        images, labels = draw_glyphs() if dataset == "glyphs" else read_files(
            dataset or "mnist", Path(data_dir))
    except ConnectionError as error:
        if dataset:
            raise UserError(f"{error}: run once online, or pass --dataset glyphs") from error
        print(f"warning: {error}: using the built-in glyphs instead", file=sys.stderr)
        dataset = "glyphs"
        images, labels = draw_glyphs()
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(42))
    few = limit and max(1, limit // 10)
    train, val = order[:54_000][:limit], order[54_000:][:few]
    test = torch.arange(60_000, 70_000)[:few]
    return Images(dataset or "mnist", images[train].to(device), images[val].to(device),
                  labels[val], images[test].to(device), labels[test])


def read_files(dataset, data_dir):
    """-> images [70000, 1, 28, 28] and labels [70000], the 10,000 of the test set last

    Raises UserError for files that are damaged, ConnectionError for a failed download.
    """
    raw = data_dir / TITLES[dataset] / "raw"
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder")
    if not all((raw / name).exists() for name in RAW_FILES):
        download(TITLES[dataset], data_dir)
    arrays = []
    for name, (md5, shape) in RAW_FILES.items():
        content = (raw / name).read_bytes()
        header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()  # 0x800: of bytes
        intact = content.startswith(header) and len(content) == len(header) + math.prod(shape)
        if dataset == "mnist":
            intact = intact and hashlib.md5(content).hexdigest() == md5
        if not intact:
            raise UserError(f"{raw / name} is damaged: delete it, and it is downloaded again")
        array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)
        arrays.append(torch.tensor(array))
    train, train_labels, test, test_labels = arrays
    return torch.cat([train, test]).unsqueeze(1), torch.cat([train_labels, test_labels])


def download(folder, data_dir):
    """Let torchvision download into a temporary folder, and move the files in when all are there.

    Raises ConnectionError where that fails, after TIMEOUT seconds without an answer.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        import torchvision  # here, as a torchvision that was not built for this torch won't load

        # In data_dir, or near it where it is not there yet: a download that fails makes no folder.
        near = next(path for path in (data_dir, *data_dir.absolute().parents) if path.is_dir())
        with tempfile.TemporaryDirectory(dir=near) as temporary:
            getattr(torchvision.datasets, folder)(temporary, download=True)
            raw = data_dir / folder / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for name in RAW_FILES:
                os.replace(Path(temporary, folder, "raw", name), raw / name)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"{folder} is not in {data_dir}/ and could not be downloaded "
                              f"({reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def draw_glyphs():
    """A stand-in for MNIST that needs no network: digits in matplotlib's own fonts, each turned,
    slanted, scaled and shifted at random; the same 70,000 images every time.

    -> images [70000, 1, 28, 28], labels [70000]
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stamps = []
    fonts = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVuS*[!y].ttf"))
    for font, digit in itertools.product(fonts, "0123456789"):  # all but the ...Display fonts
        figure = Figure(figsize=(1, 1), dpi=56)
        figure.text(0.5, 0.5, digit, size=62, font=font, ha="center", va="center")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        stamps.append(255 - np.asarray(canvas.buffer_rgba())[..., 0])
    stamps = torch.from_numpy(np.stack(stamps)).float().unsqueeze(1)  # [fonts * 10, 1, 56, 56]

    n, generator = 70_000, torch.Generator().manual_seed(0)
    choice = torch.randint(len(stamps), (n,), generator=generator)
    noise = torch.randn(n, 2, 3, generator=generator) * torch.tensor([0.12, 0.12, 0.06])
    affine = torch.tensor([[1.1, 0, 0], [0, 1.1, 0]]) + noise  # [n, 2, 3]
    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    for part in torch.arange(n).split(5000):
        grid = F.affine_grid(affine[part], [len(part), 1, 28, 28], align_corners=False)
        images[part] = F.grid_sample(stamps[choice[part]], grid, align_corners=False).byte()
    return images, choice % 10


# ---------------------------------------------------------------------------------------------
# The run folder


def new_run_folder(path):
    """Create and return `path`, or path-2, path-3, ... where it already holds something."""
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        folder = Path(f"{path}{suffix}")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"the folder {folder} cannot be made ({error.strerror}): "
                                "pass another --out-dir") from error
            return folder


def write_text(path, text):
    """Write a whole file or none: to a temporary name, then moved over the old one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_metrics(folder, rows):
    """metrics.jsonl: one row an epoch or evaluation."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def save_checkpoint(path, state):
    """Write `state` (tensors and plain Python values) whole, or leave the old file as it was.

    Raises UserError for a model that is not finite, and where the file cannot be written.
    """
    if not all(weights.isfinite().all() for weights in state["model"].values()):
        raise UserError(f"the model is not finite after step {state['step']}: start again with "
                        f"a lower learning rate ({path} keeps the last good model)")
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError from torch
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); what was there before "
                        "is untouched") from error


def load_checkpoint(path, script):
    """Read what save_checkpoint wrote. -> dict, its tensors on the CPU

    Raises UserError where there is none, where it is damaged (every byte is checked against
    the file's own checksums, which torch.load does not do) or where another script wrote it.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there: {path.parent} is not the folder of a run")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"in {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        writer = state["args"]["script"]
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, LookupError,
            TypeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}): put a copy of it back, or "
                        "start a new run") from error
    if writer != script:
        raise UserError(f"{path} was written by {writer}, not by {script}")
    return state


# ---------------------------------------------------------------------------------------------
# Pictures


def new_figure(width, height, title):
    """A matplotlib figure of width x height inches, drawn without a window or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    # medium: the first line of some titles is long; parse_math: a file name may hold a $
    figure.suptitle(title, fontsize="medium", parse_math=False)
    return figure


def tile(images, columns):
    """[N, 1, H, W] in [0, 1] -> one image, row by row, a one-pixel gap between them."""
    padded = F.pad(images, (0, 1, 0, 1), value=0.5).squeeze(1)  # [N, H + 1, W + 1]
    grid = padded.unflatten(0, (-1, columns))  # [rows, columns, H + 1, W + 1]
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)[:-1, :-1]  # [rows * (H + 1) - 1, ...]


def save_image(path, image, title):
    """One grey-scale image [H, W] in [0, 1], with about two screen pixels for each of its own."""
    height, width = image.shape
    figure = new_figure(width / 60, height / 60 + 0.6, title)
    axes = figure.add_subplot()
    axes.imshow(image.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    figure.savefig(path)


def save_curves(path, title, ylabel, x, curves, levels, xlabel="epoch"):
    """`curves`: name -> a value for each of `x`; `levels`: name -> a value or None, a dashed line.

    The scale leaves out each curve's first value, which would squash the rest: a mean over the
    first epoch has the untrained model in it.
    """
    figure = new_figure(7, 4, title)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    for name, values in curves.items():
        axes.plot(x, values, marker=".", label=f"{name} {values[-1]:.4f}")
    for name, value in levels.items():
        if value is not None:
            axes.axhline(value, color="k", linestyle="--", linewidth=1, label=f"{name} {value:.4f}")
    later = [value for values in curves.values() for value in values[1:] or values]
    later += [value for value in levels.values() if value is not None]
    margin = 0.05 * (max(later) - min(later)) or 0.05
    axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
