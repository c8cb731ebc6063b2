"""A variational autoencoder for 4-bit images (Kingma and Welling, 2014, arXiv:1312.6114).

    p(x) = E_{z ~ N(0, I)} [ prod_m p(x_m|z) ]      x_m: a pixel's value in one channel, 0..15
    log p(x) >= E_{z ~ q(z|x)} [ log p(x|z) ] - KL(q(z|x) || N(0, I))         the lower bound
    q(z|x) = N(mean(x), diag(std(x)^2)),  z = mean + std * noise, so gradients reach the encoder

    python vae.py                                       MNIST, 20 latent dimensions, 20 epochs
    python vae.py --z-dim 2                             a latent space that can be looked at
    python vae.py --dataset photos --image-size 32      your own pictures, all below photos/
    python vae.py --resume DIR --epochs 40              go on after a stop, or beyond the end

The algorithm is everything above test_results, and train_step in main; the rest is speed, files and
pictures. Q1.1, Q1.2, ... mark answers to the questions of the University of Amsterdam's Deep
Learning Practical 3 (2023); --optimizer adam --lr 1e-3 --batch-size 128 are of its template.
Shapes: N images, B in a batch, C channels of H x W pixels, D = z_dim, K = 16 values of a pixel.
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

NUM_VALUES = 16  # K, which must divide 256


def to_4_bits(images):
    """Pixels 0..255 -> 0..K - 1. Each new value stands for 256 / K old ones."""
    return images // (256 // NUM_VALUES)


# -- The lower bound --------------------------------------------------------------------------


def sample_reparameterize(mean, std):
    """Draw z from N(mean, std^2), in the shape of mean and std.

    Q1.6: a draw has no derivative. Here only the noise is drawn, and z is a differentiable function
    of mean and std.
    """
    return mean + std * torch.randn_like(std)


def reconstruction_loss(logits, x):
    """-log p(x|z) in nats per image: logits [B, K, C, H, W], x [B, C, H, W] -> [B]

    Q1.5, why "reconstruction": this loss is low if the z drawn for x decodes to x.
    """
    return F.cross_entropy(logits, x.long(), reduction="none").flatten(1).sum(1)


def kl_divergence(mean, log_std):
    """KL(N(mean, diag(std^2)) || N(0, I)) = 1/2 sum_d (std_d^2 + mean_d^2 - 1 - 2 log std_d) in
    nats: mean, log_std [B, D] -> [B]

    Q1.5, why "regularization": this loss pulls q(z|x) towards the prior, whatever x is.
    """
    return 0.5 * (torch.exp(2 * log_std) + mean**2 - 1 - 2 * log_std).sum(-1)


def elbo_to_bpd(elbo, img_shape):
    """*Minus* the lower bound, in nats per image -> bits for each of its C * H * W values. (The
    names are those of the practical.) img_shape: [B, C, H, W]"""
    return elbo * math.log2(math.e) / math.prod(img_shape[1:])


# -- Networks ---------------------------------------------------------------------------------


class Encoder(nn.Module):
    """q(z|x): images [B, C, H, W] of integers 0..15 -> mean and log std, each [B, D].

    The layers are those of Tutorial 9 of the UvA Deep Learning notebooks; sizes are for 28x28.
    """

    def __init__(self, z_dim=20, num_filters=32, channels=1, image_size=28):
        super().__init__()
        f, eighth = num_filters, math.ceil(image_size / 8)
        self.net = nn.Sequential(
            nn.Conv2d(channels, f, 3, stride=2, padding=1), nn.GELU(),   # 28x28 -> 14x14
            nn.Conv2d(f, f, 3, padding=1), nn.GELU(),                    # 14x14
            nn.Conv2d(f, 2 * f, 3, stride=2, padding=1), nn.GELU(),      # 14x14 -> 7x7
            nn.Conv2d(2 * f, 2 * f, 3, padding=1), nn.GELU(),            # 7x7
            nn.Conv2d(2 * f, 2 * f, 3, stride=2, padding=1), nn.GELU(),  # 7x7 -> 4x4
            nn.Flatten())                                                # [B, 2f * 4 * 4]
        self.mean = nn.Linear(2 * f * eighth**2, z_dim)
        self.log_std = nn.Linear(2 * f * eighth**2, z_dim)

    def forward(self, x):
        h = self.net(x / (NUM_VALUES - 1))  # 0..15 -> 0..1
        # float(): layers may give 16 bits (see train_step), and the loss needs more. tanh keeps log
        # std in -5..5, so exp cannot overflow; unlike clamp it still has a slope near the bounds.
        return self.mean(h).float(), 5 * torch.tanh(self.log_std(h).float() / 5)


class Decoder(nn.Module):
    """p(x|z): latents [B, D] -> logits [B, K, C, H, W], a categorical per pixel and channel."""

    def __init__(self, z_dim=20, num_filters=32, channels=1, image_size=28):
        super().__init__()
        f, up = num_filters, dict(kernel_size=3, stride=2, padding=1)
        half, fourth, eighth = (math.ceil(image_size / k) for k in (2, 4, 8))  # 14, 7, 4
        # Size s becomes 2s - 1, or 2s with output_padding=1 if an even size is wanted.
        self.net = nn.Sequential(
            nn.Linear(z_dim, 2 * f * eighth**2), nn.GELU(),
            nn.Unflatten(1, (2 * f, eighth, eighth)),                                        # 4x4
            nn.ConvTranspose2d(2 * f, 2 * f, output_padding=1 - fourth % 2, **up), nn.GELU(),  # 7x7
            nn.Conv2d(2 * f, 2 * f, 3, padding=1), nn.GELU(),
            nn.ConvTranspose2d(2 * f, f, output_padding=1 - half % 2, **up), nn.GELU(),      # 14x14
            nn.Conv2d(f, f, 3, padding=1), nn.GELU(),
            nn.ConvTranspose2d(f, NUM_VALUES * channels, output_padding=1 - image_size % 2, **up),
            nn.Unflatten(1, (NUM_VALUES, channels)))                             # [B, K, C, 28, 28]

    def forward(self, z):
        return self.net(z).float()


class VAE(nn.Module):
    """Encoder, decoder and the lower bound that trains them."""

    def __init__(self, z_dim=20, num_filters=32, channels=1, image_size=28):
        super().__init__()
        self.z_dim = z_dim
        self.image_shape = (channels, image_size, image_size)
        self.encoder = Encoder(z_dim, num_filters, channels, image_size)
        self.decoder = Decoder(z_dim, num_filters, channels, image_size)
        # Orthogonal weights (Saxe et al., 2014, arXiv:1312.6120) with a ReLU's gain
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x):
        """Images [B, C, H, W] of integers 0..15 -> the two terms of the loss, rec = -log p(x|z) and
        kl = KL(q(z|x) || N(0, I)), means over the batch in nats per image."""
        assert not x.is_floating_point() and x.shape[1:] == self.image_shape, \
            f"expected integers {['B', *self.image_shape]}, not {x.dtype} {[*x.shape]}"
        mean, log_std = self.encoder(x)
        z = sample_reparameterize(mean, log_std.exp())  # [B, D]
        logits = self.decoder(z)  # [B, K, C, H, W]
        return reconstruction_loss(logits, x).mean(), kl_divergence(mean, log_std).mean()

    @torch.no_grad()
    def sample(self, n):
        """Draw n images from p(x). -> integers 0..15, [n, C, H, W]

        Q1.1, the steps: draw z from the prior, decode it, draw each pixel from its categorical.
        """
        z = torch.randn(n, self.z_dim, device=next(self.parameters()).device)
        probs = self.decoder(z).softmax(1).movedim(1, -1)  # [n, C, H, W, K]
        if z.device.type == "mps":  # torch.multinomial draws wrong values there
            probs = probs.cpu()
        x = torch.multinomial(probs.flatten(0, -2), num_samples=1)  # [n * C * H * W, 1]
        return x.view(probs.shape[:-1]).to(z.device)


# -- Estimates of log p(x) --------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(model, x, num_samples, from_prior=False):
    """Estimate log p(x) as log mean w, where w = p(x|z) p(z) / r(z), for num_samples draws of z
    from a proposal r. -> nats per image [B]

    By default r(z) is q(z|x): the importance-weighted bound of Burda et al. (2016,
    arXiv:1509.00519); with one draw its mean is the lower bound. With from_prior r(z) is p(z), so w
    is p(x|z). On average either estimate is below log p(x), and comes closer with more draws.

    Q1.2: draws from the prior are inefficient, because few of them explain a given x. About
    e^KL(p(z|x) || p(z)) draws are needed (Chatterjee and Diaconis, 2018, arXiv:1511.01437), and
    this KL grows with the number of dimensions that z uses.
    Q1.3, Q1.4: the lower bound is below log p(x) by KL(q(z|x) || p(z|x)), which is never negative.
    Raising the bound raises log p(x) or narrows this gap.
    """
    mean, log_std = model.encoder(x)
    if from_prior:
        mean, log_std = torch.zeros_like(mean), torch.zeros_like(log_std)
    log_weights = []
    for _ in range(num_samples):
        z = sample_reparameterize(mean, log_std.exp())  # [B, D]
        log_x_given_z = -reconstruction_loss(model.decoder(z), x)  # [B]
        # p(z) and r(z) without their factors 1 / sqrt(2 pi), which cancel:
        log_prior = -(z**2 / 2).sum(-1)
        log_proposal = -(((z - mean) / log_std.exp())**2 / 2 + log_std).sum(-1)
        log_weights.append(log_x_given_z + log_prior - log_proposal)
    return torch.stack(log_weights).logsumexp(0) - math.log(num_samples)


@torch.no_grad()
def evaluate(model, images):
    """Means of rec and kl over images [N, C, H, W] -> two floats, nats per image. Sets torch's
    seed, so the noise is the same each time. (Each epoch of training sets its own seed.)"""
    torch.manual_seed(0)
    sums = sum(torch.stack(model(x)) * len(x) for x in images.split(100))
    return (sums / len(images)).tolist()


def test_results(model, images):
    """Print and return what a trained model reaches: test_bpd, test_rec and test_kl of all images,
    and estimates of log p(x) of a tenth of them, to save time."""
    rec, kl = evaluate(model, images)
    bpd = elbo_to_bpd(rec + kl, images.shape)
    print(f"test: {bpd:.4f} bpd | rec {rec:.1f} kl {kl:.1f}")
    x = images[::10]
    bound = -sum(evaluate(model, x))
    weighted, prior = 0, 0
    for part in tqdm(x.split(100), "log p(x)", disable=None, leave=False):
        weighted += log_likelihood(model, part, 64).sum().item() / len(x)
        prior += log_likelihood(model, part, 64, from_prior=True).sum().item() / len(x)
    print(f"log p(x) of {len(x):,} test images in nats: {bound:.1f} lower bound | {weighted:.1f} "
          f"importance-weighted, 64 draws | {prior:.1f} from 64 draws of the prior", flush=True)
    return {"test_rec": rec, "test_kl": kl, "test_bpd": bpd, "lower_bound": bound,
            "importance_weighted": weighted, "prior": prior}


# -- Pictures ---------------------------------------------------------------------------------


def mean_image(logits):
    """Each pixel's expected value, scaled to [0, 1]. logits [B, K, C, H, W] -> [B, C, H, W]"""
    values = torch.linspace(0, 1, NUM_VALUES, device=logits.device).view(1, -1, 1, 1, 1)
    return (logits.softmax(1) * values).sum(1)


@torch.no_grad()
def visualize_manifold(decoder, grid_size=20):
    """Decode a grid of two-dimensional z at the quantiles of N(0, I) (Q1.9); z[0] grows to the
    right, z[1] upwards. -> images [grid_size**2, C, H, W] in [0, 1], row by row"""
    z = common.prior_grid(grid_size).to(next(decoder.parameters()).device)
    return torch.cat([mean_image(decoder(row)) for row in z.split(grid_size)])  # saves memory


@torch.no_grad()
def save_pictures(model, images, labels, run, epoch):
    """Save pictures in the folder `run`: samples (Q1.8), reconstructions of ten of the images
    [N, C, H, W], and if z has two dimensions the manifold and all images' latents. labels: [N]"""
    torch.manual_seed(0)  # the same latents each time, so that epochs can be compared
    samples = model.sample(64) / (NUM_VALUES - 1)
    common.save_images(run / f"samples_epoch_{epoch:03d}.png", samples, columns=8)
    spread = torch.linspace(0, len(labels) - 1, min(10, len(labels))).long()
    originals = images[labels.argsort(stable=True)[spread]]  # one of each class
    means, _ = model.encoder(originals)
    rebuilt = mean_image(model.decoder(means))  # from the mean of q(z|x)
    common.save_images(run / "reconstructions.png",
                       torch.cat([originals / (NUM_VALUES - 1), rebuilt]), columns=len(originals))
    if model.z_dim == 2:
        plane = visualize_manifold(model.decoder, grid_size=20)
        common.save_images(run / "manifold.png", plane, columns=20, padding=0)
        means = torch.cat([model.encoder(x)[0] for x in images.split(100)])  # [N, 2]
        common.save_scatter(run / "latents.png", means, labels)


def main(argv=None):
    # -- Arguments, device and data -----------------------------------------------------------
    parser = argparse.ArgumentParser(
        prog="vae.py", description="Train a variational autoencoder on 4-bit images.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.number
    add("--z-dim", type=number(int, 1), default=20, help="latent dimensions")
    add("--num-filters", type=number(int, 1), default=32, help="channels of the first convolution")
    add("--lr", type=number(float, 0), default=5e-3, help="highest learning rate")
    common.add_image_flags(parser, batch_size=64)  # and --epochs --optimizer --dataset --image-size
    common.add_run_flags(parser)  # --limit --seed --device --no-amp --data-dir --out-dir --resume
    # With --resume, args are the run's, and checkpoint what its last.pt holds; else it is None.
    args, checkpoint = common.parse_args(parser, argv, may_change={"epochs", "lr"})
    device, dtype = common.pick_device(args.device, amp=not args.no_amp)  # float32 or bfloat16
    # uint8 images [N, C, H, W] and, here only for plots, labels [N]; this sets args.image_size, too
    (train, train_labels), (val, val_labels), (test, test_labels) = common.load_images(args, device)
    train, val, test = to_4_bits(train), to_4_bits(val), to_4_bits(test)

    # -- Model and optimizers -----------------------------------------------------------------
    torch.manual_seed(args.seed)
    config = {"z_dim": args.z_dim, "num_filters": args.num_filters,
              "channels": train.shape[1], "image_size": args.image_size}
    # channels_last is fastest for convolutions, but wrong on MPS (pytorch issue 140902).
    layout = torch.channels_last if device.type != "mps" else torch.contiguous_format
    model = VAE(**config).to(device, memory_format=layout)
    # Muon is for matrices and kernels (see common.py), Adam for all that is left, such as biases.
    muon = args.optimizer == "muon"
    matrices = [p for p in model.parameters() if muon and p.dim() in (2, 4)]
    others = [p for p in model.parameters() if p not in set(matrices)]  # by identity
    # common.cuda_graph needs the rate in a tensor, which the loop below fills, and capturable=True.
    lr = torch.zeros((), device=device)
    optimizers = [torch.optim.Adam(others, lr, betas=(0.9, 0.99), fused=True, capturable=True)]
    if matrices:
        optimizers.append(common.Muon(matrices, lr, weight_decay=0.05))
    rows, done = [], 0  # the results, one dict per epoch, and the number of epochs
    if checkpoint:
        rows, done = checkpoint["rows"], checkpoint["epoch"]
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = lr  # load_state_dict has replaced it

    name = f"vae-z{args.z_dim}"
    if args.dataset != "mnist":
        name = f"{name}-{Path(args.dataset).name}"
    run = Path(args.resume or common.new_run_folder(args.out_dir or f"runs/{name}"))
    common.write_json(run / "args.json", vars(args), indent=2)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {device}, {dtype}\n"
          f"{len(train):,} train, {len(val):,} val, {len(test):,} test images {[*test.shape[1:]]}\n"
          f"{done} of {args.epochs} epochs done; after a stop: --resume {run}", flush=True)
    if done == 0:
        save_pictures(model.eval(), val, val_labels, run, epoch=0)

    # -- Training -----------------------------------------------------------------------------
    # If you change this step: on CUDA its Python runs for the first batches only, then recorded
    # GPU work is repeated, with new noise. Python numbers and branches stay the same, model.x = ...
    # has no effect. A growing KL weight, or averaged weights, must be a tensor set by copy_.
    def train_step(indices):
        x = train[indices]  # [B, C, H, W]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            rec, kl = model(x)
        (rec + kl).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack([rec, kl]).detach()

    if device.type == "cuda":
        train_step = common.cuda_graph(train_step)
    for epoch in range(done + 1, args.epochs + 1):
        # Random numbers depend on seed and epoch alone, so a resumed run draws the same numbers as
        # an uninterrupted one. (A pair of integers has the same hash in every process.)
        torch.manual_seed(hash((args.seed, epoch)))
        began = time.perf_counter()
        model.train()  # of no effect, until you add a layer such as Dropout
        sums = torch.zeros(2, device=device)  # of rec and kl
        batches = torch.randperm(len(train)).to(device).split(args.batch_size)
        bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", disable=None, leave=False)
        for step, indices in enumerate(bar):
            # The rate rises in the first tenth of all epochs, then falls to 0.
            progress = (epoch - 1 + (step + 0.5) / len(batches)) / args.epochs
            lr.fill_(args.lr * min(progress / 0.1, (1 - progress) / 0.9))
            sums += train_step(indices) * len(indices)
        train_rec, train_kl = (sums / len(train)).tolist()  # waits for the device
        seconds = time.perf_counter() - began
        model.eval()
        val_rec, val_kl = evaluate(model, val)
        row = {"epoch": epoch, "seconds": seconds, "images_per_s": len(train) / seconds,
               "train_rec": train_rec, "train_kl": train_kl, "val_rec": val_rec, "val_kl": val_kl,
               "train_bpd": elbo_to_bpd(train_rec + train_kl, train.shape),
               "val_bpd": elbo_to_bpd(val_rec + val_kl, val.shape)}
        rows.append(row)
        common.check_finite(model, row)
        saved = {"model": model.state_dict(), "config": config, "epoch": epoch, "rows": rows,
                 "args": vars(args)}
        if row["val_bpd"] == min(r["val_bpd"] for r in rows):
            common.save_checkpoint(run / "best.pt", saved)
        common.write_json(run / "metrics.jsonl", *rows)
        common.save_checkpoint(run / "last.pt", saved | {
            "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        print(f"epoch {epoch:3d}/{args.epochs} | train {row['train_bpd']:.4f} "
              f"val {row['val_bpd']:.4f} bpd | rec {val_rec:.1f} kl {val_kl:.1f} | "
              f"{row['images_per_s'] / 1000:.2f}k img/s | {seconds:.1f} s", flush=True)
        if epoch in (1, 2, 5, args.epochs) or epoch % 10 == 0:
            save_pictures(model, val, val_labels, run, epoch)
            common.save_curves(run / "bpd.png", rows, ["train_bpd", "val_bpd"],  # Q1.7
                               "bits per dimension")

    # -- Test the model that is best on the validation images ---------------------------------
    best = common.load_checkpoint(run / "best.pt", script=parser.prog)
    model.load_state_dict(best["model"])
    results = test_results(model.eval(), test) | {"epoch": best["epoch"]}
    common.write_json(run / "test.json", results, indent=2)
    print(f"{name}, the best in validation: epoch {best['epoch']} of {rows[-1]['epoch']} -> {run}")


if __name__ == "__main__":
    common.run_script(main)
