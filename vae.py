"""A variational autoencoder for 4-bit MNIST (Kingma and Welling, 2014, arXiv:1312.6114).

    p(x) = E_{z ~ N(0, I)} [ prod_m Cat(x_m | f(z)_m) ]           784 pixels of 16 values each
    log p(x) >= E_{z ~ q(z|x)} [ log p(x|z) ] - KL(q(z|x) || N(0, I))         the lower bound
    q(z|x) = N(mean(x), diag(std(x)^2)),  z = mean + std * noise, so gradients reach the encoder

    python vae.py                        20 latent dimensions, 20 epochs
    python vae.py --z-dim 2              a latent space that can be looked at
    python vae.py --schedule constant --lr 1e-3 --batch-size 128 --epochs 80
                                         the recipe of the assignment
    python vae.py --resume runs/vae-z20  go on with a run that was stopped
    python vae.py --eval runs/vae-z20    print its test figures, draw its pictures again

A run leaves a folder in runs/: args.json, metrics.jsonl, last.pt, best.pt, test.json, and as
pictures the bound by epoch, samples and reconstructions, and the latent space.

"4-bit" means that a pixel is an integer from 0 to 15. "Equation" and "Q" (question) refer to the
University of Amsterdam's Deep Learning Practical 3 (2023). In the comments on shapes B is the
batch, D = z_dim the latent dimensions and K = 16 the values that a pixel can take.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

NUM_VALUES = 16  # K
LOSSES = ("rec", "kl", "bpd")  # what VAE.forward returns

# ---------------------------------------------------------------------------------------------
# Networks


class Encoder(nn.Module):
    """q(z|x): images [B, 1, 28, 28] of integers 0..15 -> mean and log std, each [B, z_dim].

    The layers are those of Tutorial 9 of the UvA Deep Learning notebooks.
    """

    def __init__(self, z_dim=20, num_filters=32):
        super().__init__()
        c = num_filters
        self.net = nn.Sequential(
            nn.Conv2d(1, c, 3, stride=2, padding=1), nn.GELU(),          # 28x28 -> 14x14
            nn.Conv2d(c, c, 3, padding=1), nn.GELU(),                    # 14x14
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.GELU(),      # 14x14 -> 7x7
            nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.GELU(),            # 7x7
            nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1), nn.GELU(),  # 7x7 -> 4x4
            nn.Flatten())                                                # [B, 2c * 4 * 4]
        self.mean = nn.Linear(2 * c * 4 * 4, z_dim)
        self.log_std = nn.Linear(2 * c * 4 * 4, z_dim)

    def forward(self, x):
        h = self.net(x / 15)  # integers 0..15 -> floats 0..1
        mean, log_std = self.mean(h).float(), self.log_std(h).float()
        # A smooth bound of -5..5: exp cannot overflow, and unlike clamp it has gradients all over.
        return mean, 5 * torch.tanh(log_std / 5)


class Decoder(nn.Module):
    """p(x|z): latents [B, z_dim] -> logits [B, 16, 28, 28], one categorical for each pixel."""

    def __init__(self, z_dim=20, num_filters=32):
        super().__init__()
        c = num_filters
        up = dict(kernel_size=3, stride=2, padding=1)
        self.net = nn.Sequential(
            nn.Linear(z_dim, 2 * c * 4 * 4), nn.GELU(),
            nn.Unflatten(1, (2 * c, 4, 4)),
            nn.ConvTranspose2d(2 * c, 2 * c, output_padding=0, **up), nn.GELU(),  # 4x4 -> 7x7
            nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.GELU(),                     # 7x7
            nn.ConvTranspose2d(2 * c, c, output_padding=1, **up), nn.GELU(),      # 7x7 -> 14x14
            nn.Conv2d(c, c, 3, padding=1), nn.GELU(),                             # 14x14
            nn.ConvTranspose2d(c, NUM_VALUES, output_padding=1, **up))            # 14x14 -> 28x28

    def forward(self, z):
        return self.net(z).float()


class VAE(nn.Module):
    """Encoder, decoder and the lower bound that trains them."""

    def __init__(self, z_dim=20, num_filters=32):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(z_dim, num_filters)
        self.decoder = Decoder(z_dim, num_filters)
        # Orthogonal weights (Saxe et al. 2014), with He's gain before a GELU, learn faster here
        # than the smaller ones that torch starts with.
        outputs = self.encoder.mean, self.encoder.log_std, self.decoder.net[-1]
        for layer in self.modules():
            if hasattr(layer, "weight"):
                nn.init.orthogonal_(layer.weight, gain=1 if layer in outputs else math.sqrt(2))
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        """Images [B, 1, 28, 28] of integers 0..15 -> the two losses of Equation 13 as means over
        the batch, rec and kl (nats per image), and their sum in bits per dimension."""
        mean, log_std = self.encoder(x)
        z = sample_reparameterize(mean, log_std.exp())  # [B, D]
        logits = self.decoder(z)  # [B, K, 28, 28]
        rec = reconstruction_loss(logits, x).mean()
        kl = kl_divergence(mean, log_std).mean()
        return rec, kl, elbo_to_bpd(rec + kl, x.shape)

    @torch.no_grad()
    def sample(self, n):
        """Draw n images from p(x). -> integers 0..15, [n, 1, 28, 28]"""
        # Q1.1, the steps: draw z from the prior, decode it, draw each pixel from its categorical.
        z = torch.randn(n, self.z_dim, device=next(self.parameters()).device)
        logits = self.decoder(z)
        # Adding Gumbel noise makes the argmax an exact draw from softmax(logits).
        gumbel = -torch.empty_like(logits).exponential_().log()
        return (logits + gumbel).argmax(1, keepdim=True)


# ---------------------------------------------------------------------------------------------
# Losses and estimates


def sample_reparameterize(mean, std):
    """A draw from N(mean, std^2), of their shape, through which gradients reach both."""
    # Q1.6: a draw has no derivative, but here the noise alone is drawn, and z is a differentiable
    # function of mean and std.
    return mean + std * torch.randn_like(std)


def reconstruction_loss(logits, x):
    """-log p(x|z): logits [B, K, 28, 28], x [B, 1, 28, 28] -> nats per image [B] (Equation 13)."""
    # Q1.5, why "reconstruction": it is how badly the one z that was drawn gives x back.
    loss = F.cross_entropy(logits, x.squeeze(1).long(), reduction="none")  # [B, 28, 28]
    return loss.sum((1, 2))


def kl_divergence(mean, log_std):
    """KL(N(mean, std^2) || N(0, 1)) in nats, summed over the last dimension (Equation 13)."""
    # Q1.5, why "regularization": it pulls every q(z|x) towards the one prior, whatever x is.
    return 0.5 * (torch.exp(2 * log_std) + mean**2 - 1 - 2 * log_std).sum(-1)


def elbo_to_bpd(elbo, img_shape):
    """The negative lower bound in nats per image -> bits per dimension. img_shape: [B, C, H, W]"""
    return elbo * math.log2(math.e) / math.prod(img_shape[1:])


def log_weight(model, x, z, mean, log_std):
    """log p(x|z) + log p(z) - log q(z) in nats, for z drawn from q = N(mean, std^2).

    x [B, 1, 28, 28]; z, mean, log_std [B, D] -> [B]. The log of its exp's expectation over z is
    log p(x), whatever q is (line 3 of Equation 9); for q(z|x) its own expectation is the lower
    bound.
    """
    def log_normal(z, mean, log_std):
        scaled = (z - mean) / log_std.exp()
        return (-0.5 * scaled**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    log_prior = log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
    return log_prior - log_normal(z, mean, log_std) - reconstruction_loss(model.decoder(z), x)


@torch.no_grad()
def log_likelihood(model, x, num_samples, proposal="posterior"):
    """Estimate log p(x) from num_samples draws of z for each image. -> nats per image [B]

    proposal "posterior" draws z from q(z|x): the importance-weighted bound of Burda et al.
    (2016, arXiv:1509.00519). "prior" draws it from p(z), which makes the weight p(x|z) alone:
    Equation 8. On average either is below log p(x), and comes closer with more draws. Memory
    does not grow with num_samples.
    """
    assert proposal in ("posterior", "prior")
    mean, log_std = model.encoder(x)
    if proposal == "prior":
        mean, log_std = torch.zeros_like(mean), torch.zeros_like(log_std)
    total = torch.full_like(mean[:, 0], -math.inf)  # log of the sum of the weights so far
    per_pass = max(1, 1000 // len(x))  # draws for each image in a pass of about 1,000 latents
    for start in range(0, num_samples, per_pass):
        draws = min(per_pass, num_samples - start)
        means, log_stds = mean.repeat(draws, 1), log_std.repeat(draws, 1)  # [draws * B, D]
        z = sample_reparameterize(means, log_stds.exp())
        log_w = log_weight(model, x.repeat(draws, 1, 1, 1), z, means, log_stds)  # [draws * B]
        total = torch.logaddexp(total, log_w.view(draws, len(x)).logsumexp(0))
    return total - math.log(num_samples)


@torch.no_grad()
def evaluate(model, images):
    """The losses over a whole set, each image once, without autocast.

    images [N, 1, 28, 28] -> dict of floats: rec and kl (nats per image), bpd
    """
    torch.manual_seed(0)  # the same noise every time; a training step sets a seed of its own
    sums = sum(torch.stack(model(x)) * len(x) for x in images.split(500))
    return dict(zip(LOSSES, (sums / len(images)).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------
# Pictures


def mean_image(logits):
    """Each pixel's expected value, scaled to [0, 1]. logits [B, K, H, W] -> [B, 1, H, W]"""
    values = torch.linspace(0, 1, NUM_VALUES, device=logits.device).view(1, -1, 1, 1)
    return (logits.softmax(1) * values).sum(1, keepdim=True)


@torch.no_grad()
def visualize_manifold(decoder, grid_size=20):
    """What a decoder of two latent dimensions draws for each point of a grid (Q1.9).

    The points are the percentiles (i + 0.5) / grid_size of the prior, z[0] growing to the right
    and z[1] upwards. -> one image [grid_size * 28, grid_size * 28] in [0, 1]
    """
    percentiles = (torch.arange(grid_size) + 0.5) / grid_size
    ticks = torch.special.ndtri(percentiles)  # the normal distribution's inverse CDF
    z1, z0 = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    z = torch.stack([z0.flatten(), z1.flatten()], 1)  # [grid_size**2, 2]
    images = mean_image(decoder(z.to(next(decoder.parameters()).device)))
    rows = images.view(grid_size, grid_size, 28, 28).transpose(1, 2)  # [row, y, column, x]
    return rows.reshape(grid_size * 28, grid_size * 28)


@torch.no_grad()
def draw_pictures(model, images, labels, run, heading, epoch):
    """Samples (Q1.8), reconstructions, and the latent space of `images` with their labels."""
    torch.manual_seed(0)  # the same latents every time, so that epochs can be compared
    samples = model.sample(64) / 15
    common.save_image(run / f"samples_epoch_{epoch:03d}.png", common.tile(samples, 8),
                      f"{heading}\nsamples after {epoch} epochs")

    first = [(labels == digit).nonzero()[0, 0] for digit in labels.unique()]
    originals = images[torch.stack(first).to(images.device)]  # one of each digit
    rebuilt = mean_image(model.decoder(model.encoder(originals)[0]))
    pairs = torch.cat([originals / 15, rebuilt])
    common.save_image(run / "reconstructions.png", common.tile(pairs, len(originals)),
                      f"{heading}\noriginals and reconstructions, epoch {epoch}")

    posteriors = [model.encoder(x) for x in images.split(500)]
    mean = torch.cat([mean for mean, _ in posteriors]).cpu()  # [N, D]
    log_std = torch.cat([log_std for _, log_std in posteriors]).cpu()  # [N, D]
    if model.z_dim == 2:
        common.save_image(run / "manifold.png", visualize_manifold(model.decoder),
                          f"{heading}\nthe decoder's mean image over the prior's percentiles")
        figure = common.new_figure(6, 6, f"{heading}\nposterior means of {len(images):,} images")
        axes = figure.add_subplot(xlabel="z[0]", ylabel="z[1]", aspect="equal")
        axes.set(xlim=(-4, 4), ylim=(-4, 4))
        points = axes.scatter(*mean.T, c=labels, s=2, cmap="tab10", vmin=0, vmax=9)
        figure.legend(*points.legend_elements(), loc="outside right center")
        figure.savefig(run / "latents.png")
    else:
        # kl_divergence sums over the last dimension; over one of size 1 it leaves D as it is.
        kl = kl_divergence(mean.unsqueeze(-1), log_std.unsqueeze(-1)).mean(0)  # [D]
        figure = common.new_figure(7, 4, f"{heading}\nKL of each latent dimension")
        axes = figure.add_subplot(xlabel="latent dimensions, sorted", ylabel="nats per image")
        axes.bar(range(1, model.z_dim + 1), kl.sort(descending=True).values)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(run / "kl.png")


def draw_curves(rows, run, heading, test_bpd=None):
    """The bound by epoch, and the test value as a line once it is known (Q1.7)."""
    curves = {name: [row[f"{name}_bpd"] for row in rows] for name in ("train", "val")}
    common.save_curves(run / "bpd.png", f"{heading}\nthe negative lower bound",
                       "bits per dimension", [row["epoch"] for row in rows], curves,
                       {"test": test_bpd})


# ---------------------------------------------------------------------------------------------
# Training


def fit(model, data, args, run, dtype, heading, state=None):
    """Fit `model` to data.train; `state`, the content of a last.pt, is where to go on from."""
    device = data.train.device
    if args.schedule == "constant":  # the recipe of the assignment
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99),
                                      weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, seconds, best, rows = 0, 0.0, math.inf, []
    sums = torch.zeros(3, device=device)  # of rec, kl and bpd over the epoch's images so far
    if state:
        optimizer.load_state_dict(state["optimizer"]["adam"])
        if state["scaler"]:  # empty after training without float16
            scaler.load_state_dict(state["scaler"])
        step, seconds, best, rows = (state[k] for k in ("step", "seconds", "best", "rows"))
        sums = state["sums"].to(device)
        common.write_metrics(run, rows)
    steps_per_epoch = math.ceil(len(data.train) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch

    def save_last():
        common.save_checkpoint(run / "last.pt", {
            "model": model.state_dict(), "optimizer": {"adam": optimizer.state_dict()},
            "scaler": scaler.state_dict(), "step": step, "seconds": seconds, "best": best,
            "rows": rows, "sums": sums, "args": vars(args)})

    def save_best():
        common.save_checkpoint(run / "best.pt", {
            "model": model.state_dict(), "args": vars(args), "step": step, "val": best})

    def stop_here():
        print(f"stopped after step {step}; go on with: python vae.py --resume {run}")
        sys.exit(130)

    if step == 0:
        val = evaluate(model, data.val)
        best = val["bpd"]
        save_best()
        save_last()
        print(f"epoch   0/{args.epochs} | untrained    | val {val['bpd']:.4f} | "
              f"rec {val['rec']:.1f} kl {val['kl']:.1f}", flush=True)
        draw_pictures(model, data.val, data.val_labels, run, heading, epoch=0)

    with common.StopRequest() as stop:
        for epoch in range(len(rows) + 1, args.epochs + 1):
            began, seen = time.perf_counter(), 0
            order = common.epoch_order(len(data.train), args.seed, epoch, device)
            batches = order.split(args.batch_size)
            batches = batches[step - (epoch - 1) * steps_per_epoch:]  # resumed within an epoch
            bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", unit=" img",
                       unit_scale=args.batch_size, disable=None, leave=False)
            for indices in bar:
                lr = args.lr
                if args.schedule == "triangle":  # up in the first tenth, then down to zero
                    progress = (step + 0.5) / total_steps
                    lr *= min(progress / 0.1, (1 - progress) / 0.9)
                optimizer.param_groups[0]["lr"] = lr
                common.seed_step(device, args.seed, step)  # so a resumed run draws the same

                x = data.train[indices]  # [B, 1, 28, 28]
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    rec, kl, bpd = model(x)
                scaler.scale(rec + kl).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

                sums += torch.stack([rec, kl, bpd]).detach() * len(x)  # read once, below
                step += 1
                seen += len(x)
                if step % 50 == 0:  # not each time: to read the loss is to wait for the device
                    loss = bpd.item()
                    bar.set_postfix_str(f"bpd {loss:.3f}")
                    if not math.isfinite(loss):
                        raise common.UserError(
                            f"the loss is not finite at step {step}: start again with a lower "
                            f"--lr ({run / 'last.pt'} keeps the last good model)")
                if stop.asked and step < epoch * steps_per_epoch:  # else at the epoch's end, below
                    bar.close()
                    seconds += time.perf_counter() - began
                    save_last()
                    stop_here()
            train = dict(zip(LOSSES, (sums / len(data.train)).tolist(), strict=True))
            sums.zero_()
            images_per_s = seen / (time.perf_counter() - began)
            val = evaluate(model, data.val)
            seconds += time.perf_counter() - began
            rows.append({"epoch": epoch, "step": step, "seconds": round(seconds, 2),
                         "images_per_s": round(images_per_s),
                         **{f"train_{name}": value for name, value in train.items()},
                         **{f"val_{name}": value for name, value in val.items()}})
            if val["bpd"] < best:
                best = val["bpd"]
                save_best()
            save_last()
            common.write_metrics(run, rows)
            print(f"epoch {epoch:3d}/{args.epochs} | train {train['bpd']:.4f} | "
                  f"val {val['bpd']:.4f} | rec {val['rec']:.1f} kl {val['kl']:.1f} | "
                  f"{images_per_s / 1000:.2f}k img/s | {seconds:.1f} s", flush=True)
            if epoch in (1, 2, 5) or epoch % 10 == 0:
                draw_pictures(model, data.val, data.val_labels, run, heading, epoch)
                draw_curves(rows, run, heading)
            if stop.asked:
                stop_here()
    return rows


def report_test(model, images):
    """Print and return the figures of a finished model, the estimates those of 1,000 images."""
    test = evaluate(model, images)
    print(f"test: {test['bpd']:.4f} bpd | rec {test['rec']:.1f} kl {test['kl']:.1f}")
    x = images[:1000]
    few = evaluate(model, x)
    torch.manual_seed(0)
    estimates = {
        # Q1.4: below log p(x) by KL(q(z|x) || p(z|x)), a gap that importance weights narrow.
        "lower_bound": -few["rec"] - few["kl"],
        "importance_weighted": log_likelihood(model, x, 64).mean().item(),
        # Q1.2, why it is inefficient: next to no draw from the prior explains a given x, and the
        # share of those that do falls exponentially with the dimensions of z.
        "prior": log_likelihood(model, x, 64, "prior").mean().item()}
    print(f"log p(x) of {len(x):,} test images in nats: "
          f"{estimates['lower_bound']:.1f} lower bound | "
          f"{estimates['importance_weighted']:.1f} importance-weighted, 64 draws | "
          f"{estimates['prior']:.1f} from 64 draws of the prior (Equation 8)", flush=True)
    return {f"test_{name}": value for name, value in test.items()} | estimates


def parse_args(argv=None, run_args=None):
    parser = argparse.ArgumentParser(
        prog="vae.py", description="Train a variational autoencoder on 4-bit MNIST.",
        allow_abbrev=False)
    default = "(default: %(default)s)"
    group = parser.add_argument_group("model")
    group.add_argument("--z-dim", type=common.integer(1), default=20,
                       help=f"latent dimensions {default}")
    group.add_argument("--num-filters", type=common.integer(1), default=32,
                       help=f"channels of the first convolution {default}")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=common.integer(1), default=20,
                       help=f"passes over the training images {default}")
    group.add_argument("--batch-size", type=common.integer(1), default=64,
                       help=f"images a step {default}")
    group.add_argument("--lr", type=common.positive, default=5e-3,
                       help=f"highest learning rate {default}")
    group.add_argument("--schedule", choices=["triangle", "constant"], default="triangle",
                       help="the learning rate rises in the first tenth of the steps and falls to "
                       f"zero in the rest (with AdamW), or is constant (with Adam) {default}")
    group.add_argument("--seed", type=common.integer(0), default=42,
                       help=f"of the weights, the order of the data and the noise {default}")
    group = parser.add_argument_group("data, device and run")
    group.add_argument("--dataset", choices=common.DATASETS, help="default: mnist, or the built-in "
                       "glyphs where it can be neither found nor downloaded")
    group.add_argument("--data-dir", default="data", metavar="DIR",
                       help=f"where the dataset is, or is downloaded to {default}")
    group.add_argument("--limit", type=common.integer(1), metavar="N", help="a quick try: only N "
                       "training images and N / 10 of validation and test (default: all)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                       help=f"auto takes cuda, else mps, else cpu {default}")
    group.add_argument("--no-amp", action="store_true", help="no autocast to bfloat16 or "
                       "float16 on CUDA (elsewhere there is none anyway)")
    group.add_argument("--out-dir", metavar="DIR", help="where the run is kept; a folder that "
                       "holds something gets a suffix (default: runs/vae-z20 for --z-dim 20)")
    group.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, under its own "
                       "arguments; only --device and --data-dir may be given beside it")
    group.add_argument("--eval", metavar="DIR", help="print the test figures of the run in DIR and "
                       "draw its pictures, without training")
    parser.set_defaults(script="vae.py")
    return common.parse_run_args(parser, argv, run_args)


@common.command("vae.py")
def main(argv=None):
    args, state = parse_args(argv), None
    if args.resume is not None or args.eval is not None:
        run, name = (args.eval, "best.pt") if args.resume is None else (args.resume, "last.pt")
        run = Path(run)
        state = common.load_checkpoint(run / name, "vae.py")
        args = parse_args(argv, state["args"])  # the run's own, but for what is given now
    device, dtype = common.pick_device(args.device, not args.no_amp)
    data = common.load_mnist(args.dataset, args.data_dir, args.limit, device)
    # To 4 bits: x >> 4 is floor(x / 255 * 16), clamped to 15, for each of the 256 values.
    data = data._replace(train=data.train >> 4, val=data.val >> 4, test=data.test >> 4)
    stand_in = data.name == "glyphs" and args.dataset is None
    args.dataset = data.name

    torch.manual_seed(args.seed)
    model = VAE(args.z_dim, args.num_filters)
    if state:
        model.load_state_dict(state["model"])
    else:
        suffix = "" if data.name == "mnist" else f"-{data.name}"
        run = common.new_run_folder(args.out_dir or f"runs/vae-z{args.z_dim}{suffix}")
        common.write_text(run / "args.json", json.dumps(vars(args), indent=2) + "\n")
    model.to(device, memory_format=torch.channels_last)  # the layout convolutions are fastest in
    steps_per_epoch = math.ceil(len(data.train) / args.batch_size)
    heading = f"VAE on {common.TITLES.get(data.name, data.name)}, z {args.z_dim}"
    print(f"{heading}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} in "
          f"{str(dtype).removeprefix('torch.')}; {len(data.train):,} train, {len(data.val):,} val, "
          f"{len(data.test):,} test images; {args.epochs} epochs of {steps_per_epoch:,} steps; "
          f"-> {run}", flush=True)

    if args.eval is None:
        rows = fit(model, data, args, run, dtype, heading, state)
        state = common.load_checkpoint(run / "best.pt", "vae.py")
        model.load_state_dict(state["model"])
    epoch = state["step"] // steps_per_epoch
    print(f"the best model by validation is that of epoch {epoch}/{args.epochs}")
    results = report_test(model, data.test)
    draw_pictures(model, data.test, data.test_labels, run, heading, epoch)
    if args.eval is None:
        draw_curves(rows, run, heading, results["test_bpd"])
        results |= {"epoch": epoch, "seconds": rows[-1]["seconds"], "device": str(device),
                    "torch": torch.__version__}
        common.write_text(run / "test.json", json.dumps(results, indent=2) + "\n")
    if stand_in:
        print("warning: no MNIST, so all this is of the built-in glyphs", file=sys.stderr)
    print(run)


if __name__ == "__main__":
    main()
