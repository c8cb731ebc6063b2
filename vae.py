"""A variational autoencoder for 4-bit MNIST (Kingma and Welling, 2014, arXiv:1312.6114).

    p(x) = E_{z ~ N(0, I)} [ prod_m p(x_m|z) ]     784 pixels x_m, each a categorical of 16 values
    log p(x) >= E_{z ~ q(z|x)} [ log p(x|z) ] - KL(q(z|x) || N(0, I))         the lower bound
    q(z|x) = N(mean(x), diag(std(x)^2)),  z = mean + std * noise, so gradients reach the encoder

    python vae.py                        20 latent dimensions, 20 epochs
    python vae.py --z-dim 2              a latent space that can be looked at
    python vae.py --resume runs/vae-z20  go on with a run that was stopped
    python vae.py --resume runs/vae-z20 --epochs 40
                                         go on beyond the end of a run

A run leaves a folder in runs/: args.json, metrics.jsonl (a row per epoch), last.pt to resume from,
best.pt by validation, test.json, and as pictures the bound by epoch, samples, reconstructions and
the latent space. --resume of a finished run prints its test figures and draws the pictures again.

The model is that of the University of Amsterdam's Deep Learning Practical 3 (2023). Comments that
begin with Q1.1, Q1.2, ... answer its questions. To train as it asks, pass --batch-size 128 and
--lr 1e-3, and replace the two statements that a comment "Practical:" follows by what it says.

In comments on shapes B is the batch size, D = z_dim, and K = 16 the number of pixel values.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

NUM_VALUES = 16  # K


def to_4_bits(images):
    """Pixels 0..255 -> 0..15: x >> 4 is floor(x / 256 * 16)."""
    return images >> 4


# -- Networks ---------------------------------------------------------------------------------


def init(layer, gain=2**0.5):
    """Orthogonal weights (Saxe et al., 2014, arXiv:1312.6120) times `gain`, and zero biases. Before
    a ReLU or GELU the usual gain is sqrt(2) (He et al., 2015, arXiv:1502.01852), else 1."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def at_least_float32(x):
    """Autocast's 16-bit numbers as float32. A model in float64 stays in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Encoder(nn.Module):
    """q(z|x): images [B, 1, 28, 28] of integers 0..15 -> mean and log std, each [B, z_dim].

    The layers are those of Tutorial 9 of the UvA Deep Learning notebooks.
    """

    def __init__(self, z_dim=20, num_filters=32):
        super().__init__()
        c = num_filters
        self.net = nn.Sequential(
            init(nn.Conv2d(1, c, 3, stride=2, padding=1)), nn.GELU(),          # 28x28 -> 14x14
            init(nn.Conv2d(c, c, 3, padding=1)), nn.GELU(),                    # 14x14
            init(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)), nn.GELU(),      # 14x14 -> 7x7
            init(nn.Conv2d(2 * c, 2 * c, 3, padding=1)), nn.GELU(),            # 7x7
            init(nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1)), nn.GELU(),  # 7x7 -> 4x4
            nn.Flatten())                                                      # [B, 2c * 4 * 4]
        self.mean = init(nn.Linear(2 * c * 4 * 4, z_dim), gain=1)
        self.log_std = init(nn.Linear(2 * c * 4 * 4, z_dim), gain=1)

    def forward(self, x):
        h = self.net((x / 15).to(self.mean.weight.dtype))  # 0..15 -> 0..1
        mean, log_std = at_least_float32(self.mean(h)), at_least_float32(self.log_std(h))
        # The log std is bounded to -5..5, so that its exp cannot overflow; smoothly, as clamp
        # would leave no gradient to a value that once got outside.
        return mean, 5 * torch.tanh(log_std / 5)


class Decoder(nn.Module):
    """p(x|z): latents [B, z_dim] -> logits [B, 16, 28, 28], one categorical for each pixel."""

    def __init__(self, z_dim=20, num_filters=32):
        super().__init__()
        c = num_filters
        up = dict(kernel_size=3, stride=2, padding=1)
        self.net = nn.Sequential(
            init(nn.Linear(z_dim, 2 * c * 4 * 4)), nn.GELU(),
            nn.Unflatten(1, (2 * c, 4, 4)),
            init(nn.ConvTranspose2d(2 * c, 2 * c, output_padding=0, **up)), nn.GELU(),  # -> 7x7
            init(nn.Conv2d(2 * c, 2 * c, 3, padding=1)), nn.GELU(),                     # 7x7
            init(nn.ConvTranspose2d(2 * c, c, output_padding=1, **up)), nn.GELU(),      # -> 14x14
            init(nn.Conv2d(c, c, 3, padding=1)), nn.GELU(),                             # 14x14
            init(nn.ConvTranspose2d(c, NUM_VALUES, output_padding=1, **up), gain=1))    # -> 28x28

    def forward(self, z):
        return at_least_float32(self.net(z))


class VAE(nn.Module):
    """Encoder, decoder and the lower bound that trains them."""

    def __init__(self, z_dim=20, num_filters=32):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(z_dim, num_filters)
        self.decoder = Decoder(z_dim, num_filters)

    def forward(self, x):
        """Images [B, 1, 28, 28] of integers 0..15 -> rec, kl, bpd, means over the batch.

        rec = -log p(x|z) and kl = KL(q(z|x) || N(0, I)) are in nats per image; their sum, the
        negative lower bound, is the loss. bpd is this sum in bits per dimension.
        """
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
        weight = self.encoder.mean.weight
        z = torch.randn(n, self.z_dim, device=weight.device, dtype=weight.dtype)
        logits = self.decoder(z)
        # -log of an exponential draw is Gumbel noise, and the argmax of logits plus Gumbel noise
        # is an exact draw from softmax(logits).
        gumbel = -torch.empty_like(logits).exponential_().log()
        return (logits + gumbel).argmax(1, keepdim=True)


# -- Losses and estimates ---------------------------------------------------------------------


def sample_reparameterize(mean, std):
    """A draw from N(mean, std^2), in the shape of mean and std, that gradients pass through."""
    # Q1.6: a draw has no derivative. Here only the noise is drawn, and z is a differentiable
    # function of mean and std.
    return mean + std * torch.randn_like(std)


def reconstruction_loss(logits, x):
    """-log p(x|z) in nats per image: logits [B, K, 28, 28], x [B, 1, 28, 28] -> [B]"""
    # Q1.5, why "reconstruction": it is low where the z drawn for x decodes to x.
    loss = F.cross_entropy(logits, x.squeeze(1).long(), reduction="none")  # [B, 28, 28]
    return loss.sum((1, 2))


def kl_divergence(mean, log_std):
    """KL(N(mean, std^2) || N(0, 1)) in nats, summed over the last dimension:
    1/2 sum_d (std_d^2 + mean_d^2 - 1 - 2 log std_d)"""
    # Q1.5, why "regularization": it pulls q(z|x) towards the prior, whatever x is.
    return 0.5 * (torch.exp(2 * log_std) + mean**2 - 1 - 2 * log_std).sum(-1)


def elbo_to_bpd(elbo, img_shape):
    """Nats per image -> bits per dimension. elbo, which has its name from the practical, is the
    *negative* lower bound, our loss. img_shape: [B, C, H, W]"""
    return elbo * math.log2(math.e) / math.prod(img_shape[1:])


def log_weight(model, x, z, mean, log_std):
    """log w in nats, for w = p(x|z) p(z) / q(z) and z drawn from q = N(mean, std^2).

    x [B, 1, 28, 28]; z, mean, log_std [B, D] -> [B]. Whatever q is, the mean of w is p(x), so the
    mean of log w is at most log p(x) (Jensen). With q = q(z|x) this mean is the lower bound.
    """
    # Both without the term log(2 pi) / 2, which cancels:
    log_prior = -(z**2 / 2).sum(-1)
    log_q = -(((z - mean) / log_std.exp())**2 / 2 + log_std).sum(-1)
    return log_prior - log_q - reconstruction_loss(model.decoder(z), x)


@torch.no_grad()
def log_likelihood(model, x, num_samples, proposal="posterior"):
    """Estimate log p(x) by the log of the mean of num_samples weights w. -> nats per image [B]

    With proposal "posterior", z is drawn from q(z|x): the importance-weighted bound of Burda et
    al. (2016, arXiv:1509.00519). With "prior" it is drawn from p(z), and w is p(x|z). On average
    both are below log p(x) and rise with num_samples. Memory does not grow with num_samples.
    """
    assert proposal in ("posterior", "prior")
    mean, log_std = model.encoder(x)
    if proposal == "prior":
        mean, log_std = torch.zeros_like(mean), torch.zeros_like(log_std)  # so q(z) is p(z)
    total = torch.full_like(mean[:, 0], -math.inf)  # log of the sum of the weights so far
    at_once = max(1, 1000 // len(x))  # draws per image that are decoded together
    for start in range(0, num_samples, at_once):
        draws = min(at_once, num_samples - start)
        # All B images for the first draw, then all for the second, ...
        means, log_stds = mean.repeat(draws, 1), log_std.repeat(draws, 1)  # [draws * B, D]
        z = sample_reparameterize(means, log_stds.exp())
        log_w = log_weight(model, x.repeat(draws, 1, 1, 1), z, means, log_stds)  # [draws * B]
        total = torch.logaddexp(total, log_w.view(draws, len(x)).logsumexp(0))
    return total - math.log(num_samples)


@torch.no_grad()
def evaluate(model, images):
    """rec and kl over a whole set [N, 1, 28, 28], without autocast: two floats, nats per image"""
    torch.manual_seed(0)  # the same noise each time; main seeds anew for each epoch
    sums = sum(torch.stack(model(x)[:2]) * len(x) for x in images.split(500))
    return (sums / len(images)).tolist()


def test_figures(model, images):
    """Print and return the figures of a finished model, in nats per image if not in bpd."""
    rec, kl = evaluate(model, images)
    bpd = elbo_to_bpd(rec + kl, images.shape)
    print(f"test: {bpd:.4f} bpd | rec {rec:.1f} kl {kl:.1f}")
    # Q1.4: the bound is below log p(x) by KL(q(z|x) || p(z|x)); importance weights narrow this gap.
    # Q1.2: draws from the prior are inefficient. Hardly any of them explains a given x, and the
    # share of those that do falls exponentially with the dimensions of z.
    x = images[::10]  # not images[:1000], as MNIST's test images are sorted by groups of writers
    bound = -sum(evaluate(model, x))
    weighted, prior = 0, 0
    for part in tqdm(x.split(50), "log p(x)", disable=None, leave=False):
        weighted += log_likelihood(model, part, 64).sum().item() / len(x)
        prior += log_likelihood(model, part, 64, "prior").sum().item() / len(x)
    print(f"log p(x) of {len(x):,} test images in nats: {bound:.1f} lower bound | {weighted:.1f} "
          f"importance-weighted, 64 draws | {prior:.1f} from 64 draws of the prior", flush=True)
    return {"test_rec": rec, "test_kl": kl, "test_bpd": bpd, "lower_bound": bound,
            "importance_weighted": weighted, "prior": prior}


# -- Pictures ---------------------------------------------------------------------------------


def mean_image(logits):
    """Each pixel's expected value, scaled to [0, 1]. logits [B, K, H, W] -> [B, 1, H, W]"""
    values = torch.linspace(0, 1, NUM_VALUES, device=logits.device).view(1, -1, 1, 1)
    return (logits.softmax(1) * values).sum(1, keepdim=True)


@torch.no_grad()
def visualize_manifold(decoder, grid_size=20):
    """What a decoder of two latent dimensions makes of the prior's percentiles (Q1.9), z[0] growing
    to the right and z[1] upwards. -> one image [grid_size * 28, grid_size * 28] in [0, 1]"""
    z = common.prior_grid(grid_size).to(next(decoder.parameters()).device)
    return common.tile(mean_image(decoder(z)), grid_size, gap=0)


@torch.no_grad()
def draw_pictures(model, images, labels, run, heading, epoch, split="validation"):
    """Samples (Q1.8), and reconstructions and latent space of the split's images."""
    torch.manual_seed(0)  # the same latents each time, so that epochs can be compared
    common.save_image(run / f"samples_epoch_{epoch:03d}.png", common.tile(model.sample(64) / 15, 8),
                      f"{heading}\nsamples after {epoch} epochs")
    originals = common.one_of_each(images, labels)
    rebuilt = mean_image(model.decoder(model.encoder(originals)[0]))
    common.save_image(run / "reconstructions.png",
                      common.tile(torch.cat([originals / 15, rebuilt]), len(originals)),
                      f"{heading}\n{split} images and reconstructions after {epoch} epochs")

    posteriors = [model.encoder(x) for x in images.split(500)]
    mean = torch.cat([mean for mean, _ in posteriors]).cpu()  # [N, D]
    log_std = torch.cat([log_std for _, log_std in posteriors]).cpu()  # [N, D]
    if model.z_dim == 2:
        common.save_image(run / "manifold.png", visualize_manifold(model.decoder),
                          f"{heading}\nthe decoder's mean image over the prior's percentiles")
        common.save_scatter(run / "latents.png", mean, labels, f"{heading}\nposterior means of "
                            f"{len(images):,} {split} images; circles: 1, 2, 3 sigma of the prior")
    else:
        # kl_divergence sums over the last dimension: a new one, of size 1, keeps the D values.
        per_dimension = kl_divergence(mean[..., None], log_std[..., None]).mean(0)  # [D]
        title = f"{heading}\nKL of each dimension, mean over {len(images):,} {split} images"
        with common.picture(run / "kl.png", 7, 4, title) as figure:
            axes = figure.add_subplot(xlabel="latent dimensions, sorted", ylabel="nats per image")
            axes.bar(range(1, model.z_dim + 1), sorted(per_dimension.tolist(), reverse=True))
            axes.xaxis.get_major_locator().set_params(integer=True)


def draw_curves(rows, run, heading, **levels):
    """The bound by epoch (Q1.7); `levels`, such as test=0.5, are dashed lines."""
    common.save_curves(run / "bpd.png", f"{heading}\nthe negative lower bound",
                       "bits per dimension", rows, {"train": "train_bpd", "val": "val_bpd"}, levels)


@common.command("vae.py")  # prints a common.UserError without its traceback
def main(argv=None):
    # -- Arguments, device and data -----------------------------------------------------------
    parser = argparse.ArgumentParser(
        prog="vae.py", description="Train a variational autoencoder on 4-bit MNIST.",
        allow_abbrev=False, formatter_class=common.HelpFormatter)
    parser.add_argument("--z-dim", type=common.number(int, 1), default=20, help="latent dimensions")
    parser.add_argument("--num-filters", type=common.number(int, 1), default=32,
                        help="channels of the first convolution")
    parser.add_argument("--lr", type=common.number(float, 0), default=5e-3,
                        help="highest learning rate")
    common.add_run_arguments(parser, batch_size=64)
    # With --resume: args are the run's own, except those in may_change; state is its last.pt.
    args, state = common.parse_args(parser, argv, may_change={"epochs", "lr"})

    device, dtype = common.pick_device(args.device, amp=not args.no_amp)
    torch.set_flush_denormal(True)  # a CPU takes many times longer for numbers below 1e-38
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, torch's default for convolutions
    data = common.load_mnist(args.dataset, args.data_dir, args.limit, device)
    train, val, test = (to_4_bits(images) for images in (data.train, data.val, data.test))
    args.dataset = data.name  # the one that "auto" chose
    name, heading = f"vae-z{args.z_dim}", f"VAE on {common.TITLES[data.name]}, z {args.z_dim}"
    if data.name != "mnist":
        name = f"{name}-{data.name}"

    # -- Model and optimizer ------------------------------------------------------------------
    torch.manual_seed(args.seed)
    model = VAE(args.z_dim, args.num_filters)
    model.to(device, memory_format=torch.channels_last)  # the layout convolutions are fastest in
    # Muon for matrices and kernels: after 4 epochs validation is at 0.535 bpd; AdamW: 0.544.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    optimizers = [common.Muon(matrices, args.lr, weight_decay=0.05),
                  torch.optim.AdamW(biases, args.lr, betas=(0.9, 0.99), fused=True,
                                    capturable=True)]  # for common.cuda_graph
    # Practical: optimizers = [torch.optim.Adam(model.parameters(), fused=True, capturable=True)]
    # For float16. The loss is a sum over 784 pixels, so gradients are large: with the default scale
    # of 2**16 they overflow, and the first ten steps are skipped.
    scaler = torch.amp.GradScaler(device.type, init_scale=2**6, enabled=dtype == torch.float16)
    rows = []  # one per epoch

    # -- A new run, or an old one to go on with -----------------------------------------------
    if state:
        common.load_checkpoint(Path(args.resume, "best.pt"), args.script)  # if damaged, fail now
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty after training without float16
            scaler.load_state_dict(state["scaler"])
        rows = state["rows"]
    # The learning rate is a tensor, which is filled before each step and read by a CUDA graph. It
    # is set here, as load_state_dict would replace it by a copy.
    lr = torch.zeros((), device=device)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    run = common.open_run(args, state, name, len(rows))
    steps_per_epoch = math.ceil(len(train) / args.batch_size)
    print(f"{heading}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} in "
          f"{str(dtype).removeprefix('torch.')}; {len(train):,} train, {len(val):,} val, "
          f"{len(test):,} test images; {args.epochs} epochs of {steps_per_epoch:,} steps, "
          f"{len(rows)} of them done, saved after each; -> {run}", flush=True)
    if not rows:
        rec, kl = evaluate(model, val)
        print(f"epoch   0/{args.epochs} | untrained    | val "
              f"{elbo_to_bpd(rec + kl, val.shape):.4f} | rec {rec:.1f} kl {kl:.1f}", flush=True)
        draw_pictures(model, val, data.val_labels, run, heading, epoch=0)

    # -- Training -----------------------------------------------------------------------------
    def train_step(indices):  # in the form that common.cuda_graph takes
        x = train[indices]  # [B, 1, 28, 28]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            rec, kl, _ = model(x)
        scaler.scale(rec + kl).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        return torch.stack([rec, kl]).detach()

    # A CUDA graph cannot read a number back, as a scaler does.
    if device.type == "cuda" and not scaler.is_enabled():
        train_step = common.cuda_graph(train_step)
    for epoch in range(len(rows) + 1, args.epochs + 1):
        # An epoch's random numbers depend on seed and epoch alone, so a resumed run draws the same
        # as one that was never stopped. (The hash of two integers is the same in every process.)
        torch.manual_seed(hash((args.seed, epoch)))
        began = time.perf_counter()
        sums = torch.zeros(2, device=device)  # of rec and kl
        order = torch.randperm(len(train)).to(device)
        bar = tqdm(order.split(args.batch_size), f"epoch {epoch}/{args.epochs}", unit=" img",
                   unit_scale=args.batch_size, disable=None, leave=False)
        for step, indices in enumerate(bar, (epoch - 1) * steps_per_epoch):
            # The schedule: the rate rises in the first tenth of the steps, then falls to zero. (If
            # a run is extended, the rate goes up again, to its place in the longer schedule.)
            progress = (step + 0.5) / (args.epochs * steps_per_epoch)
            lr.fill_(args.lr * min(progress / 0.1, (1 - progress) / 0.9))
            # Practical: lr.fill_(args.lr)
            losses = train_step(indices)  # rec, kl
            sums += losses * len(indices)
            if step % 50 == 49:  # not each time: to read the loss is to wait for the device
                bar.set_postfix_str(f"bpd {elbo_to_bpd(losses.sum().item(), train.shape):.3f}")
                if not losses.isfinite().all():  # (weights are checked in save_checkpoint)
                    raise common.UserError(f"the loss is not finite at step {step + 1}: start "
                                           f"again with a lower --lr ({run} holds what was saved)")
        train_rec, train_kl = (sums / len(train)).tolist()  # waits for the device
        train_seconds = time.perf_counter() - began
        val_rec, val_kl = evaluate(model, val)
        seconds = time.perf_counter() - began + (rows[-1]["seconds"] if rows else 0)  # cumulative
        row = {"epoch": epoch, "step": step + 1, "seconds": round(seconds, 2),
               "images_per_s": round(len(train) / train_seconds),
               "train_rec": train_rec, "train_kl": train_kl, "val_rec": val_rec, "val_kl": val_kl,
               "train_bpd": elbo_to_bpd(train_rec + train_kl, train.shape),
               "val_bpd": elbo_to_bpd(val_rec + val_kl, val.shape)}
        rows.append(row)
        if row["val_bpd"] == min(other["val_bpd"] for other in rows):  # the best so far
            common.save_checkpoint(run / "best.pt", {
                "model": model.state_dict(), "epoch": epoch, "args": vars(args)})
        common.save_checkpoint(run / "last.pt", {
            "model": model.state_dict(), "scaler": scaler.state_dict(), "rows": rows,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "args": vars(args)})
        common.write_json(run / "metrics.jsonl", *rows)
        print(f"epoch {epoch:3d}/{args.epochs} | train {row['train_bpd']:.4f} | "
              f"val {row['val_bpd']:.4f} | rec {val_rec:.1f} kl {val_kl:.1f} | "
              f"{row['images_per_s'] / 1000:.2f}k img/s | {seconds:.1f} s", flush=True)
        if epoch in (1, 2, 5) or epoch % 10 == 0:
            draw_pictures(model, val, data.val_labels, run, heading, epoch)
            draw_curves(rows, run, heading)

    # -- The best model on the test images ----------------------------------------------------
    best = common.load_checkpoint(run / "best.pt", args.script)
    model.load_state_dict(best["model"])
    print(f"the best model by validation is that of epoch {best['epoch']} of {len(rows)}")
    figures = test_figures(model, test)
    draw_pictures(model, test, data.test_labels, run, heading, best["epoch"], "test")
    draw_curves(rows, run, heading, test=figures["test_bpd"])
    common.close_run(args, run, rows,
                     figures | {"epoch": best["epoch"], "device": str(device)}, len(rows))
    print(f"{heading} -> {run}")


if __name__ == "__main__":
    main()
