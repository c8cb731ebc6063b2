"""An adversarial autoencoder (Makhzani et al., 2015, arXiv:1511.05644).

    An encoder E turns images x into codes, a decoder R turns codes into reconstructions. D(z) is
    the discriminator's probability that z is a draw from the prior N(0, I), and not a code:

    min_{E,R}  lambda mean (x - R(E(x)))^2
               + (1 - lambda) max_D ( mean_z log D(z) + mean_x log(1 - D(E(x))) )

    python aae.py                                    MNIST, 8 latent dimensions, 20 epochs
    python aae.py --z-dim 2                          a latent space that can be looked at
    python aae.py --lam 1                            a plain autoencoder
    python aae.py --z-dim 20 --posterior gaussian    a stochastic encoder (or: universal)
    python aae.py --dataset photos --image-size 32   your own pictures, all below photos/
    python aae.py --resume DIR --epochs 40           go on after a stop, or beyond the end

The algorithm is everything down to AdversarialAE, and train_step in main; the rest is a distance,
speed, files and pictures. Q2.1, Q2.2, ... mark answers to the questions of the University of
Amsterdam's Deep Learning Practical 3 (2023). Shapes: N images, B in a batch, C channels of H x W.
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


def to_float(images):
    """uint8 -> floats in [-1, 1]"""
    return images / 127.5 - 1


def sample_prior(n, z_dim, device):
    """Draw n codes from the prior, N(0, I). -> [n, z_dim]. (Make another prior of torch.randn,
    torch.randint and the like. A CUDA graph records these, but not torch.tensor([...]).)"""
    return torch.randn(n, z_dim, device=device)


# -- Networks ---------------------------------------------------------------------------------


class Encoder(nn.Module):
    """E: images [B, C, H, W] in [-1, 1] -> codes [B, z_dim], one draw from q(z|x) for each.

    The convolutions are those of Tutorial 9 of the UvA Deep Learning notebooks; sizes are for
    28x28. Q2.1: the distribution of all codes, q(z), is the mean of q(z|x) over the images. The
    posterior q(z|x) is one of three (section 2 of the paper):

    - "deterministic": a point mass at E(x), so all randomness of q(z) comes from the data.
    - "gaussian": N(mean(x), diag(std(x)^2)), so q(z) is a mixture of Gaussians.
    - "universal": the mean over noise of a point mass at E(x, noise), so its shape is learned.

    Q2.7: images have fewer degrees of freedom than a large z has dimensions. So deterministic codes
    lie on a thin set that cannot fill N(0, I); noise makes it thicker. (The distance that evaluate
    measures cannot see this: projected on a line, a thin set looks nearly Gaussian.)
    """

    def __init__(self, z_dim=8, posterior="deterministic", num_filters=32, channels=1,
                 image_size=28):
        super().__init__()
        self.posterior, self.noise_dim = posterior, 32
        f, eighth = num_filters, math.ceil(image_size / 8)
        self.net = nn.Sequential(
            nn.Conv2d(channels, f, 3, stride=2, padding=1), nn.ReLU(),   # 28x28 -> 14x14
            nn.Conv2d(f, f, 3, padding=1), nn.ReLU(),                    # 14x14
            nn.Conv2d(f, 2 * f, 3, stride=2, padding=1), nn.ReLU(),      # 14x14 -> 7x7
            nn.Conv2d(2 * f, 2 * f, 3, padding=1), nn.ReLU(),            # 7x7
            nn.Conv2d(2 * f, 2 * f, 3, stride=2, padding=1), nn.ReLU(),  # 7x7 -> 4x4
            nn.Flatten())                                                # [B, 2f * 4 * 4]
        features = 2 * f * eighth**2
        if posterior == "deterministic":
            self.out = nn.Linear(features, z_dim)
        elif posterior == "gaussian":
            self.out = nn.Linear(features, 2 * z_dim)
        elif posterior == "universal":
            self.out = nn.Sequential(nn.Linear(features + self.noise_dim, 256), nn.ReLU(),
                                     nn.Linear(256, z_dim))

    def forward(self, x):
        h = self.net(x)
        if self.posterior == "universal":
            noise = torch.randn(len(h), self.noise_dim, device=h.device, dtype=h.dtype)
            h = torch.cat([h, noise], 1)
        out = self.out(h).float()  # layers may give 16 bits (see train_step); losses need more
        if self.posterior != "gaussian":
            return out
        mean, log_std = out.chunk(2, dim=1)  # [B, z_dim] each
        # tanh keeps log std in -5..5, so exp cannot overflow; unlike clamp it keeps a slope.
        return mean + torch.exp(5 * torch.tanh(log_std / 5)) * torch.randn_like(mean)


class Decoder(nn.Module):
    """R: codes [B, z_dim] -> images [B, C, H, W] in [-1, 1]."""

    def __init__(self, z_dim=8, num_filters=32, channels=1, image_size=28):
        super().__init__()
        f, up = num_filters, dict(kernel_size=3, stride=2, padding=1)
        half, fourth, eighth = (math.ceil(image_size / k) for k in (2, 4, 8))  # 14, 7, 4
        # Size s becomes 2s - 1, or 2s with output_padding=1 if an even size is wanted.
        self.net = nn.Sequential(
            nn.Linear(z_dim, 2 * f * eighth**2), nn.ReLU(),
            nn.Unflatten(1, (2 * f, eighth, eighth)),                                        # 4x4
            nn.ConvTranspose2d(2 * f, 2 * f, output_padding=1 - fourth % 2, **up), nn.ReLU(),  # 7x7
            nn.Conv2d(2 * f, 2 * f, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(2 * f, f, output_padding=1 - half % 2, **up), nn.ReLU(),      # 14x14
            nn.Conv2d(f, f, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(f, channels, output_padding=1 - image_size % 2, **up))        # 28x28

    def forward(self, z):
        return self.net(z).float().tanh()


class Discriminator(nn.Module):
    """The logit of D: codes [B, z_dim] -> [B, 1], above 0 if they look drawn from the prior."""

    def __init__(self, z_dim=8):
        super().__init__()
        # No batch normalization: with it a code's output would depend on the batch's other codes.
        self.net = nn.Sequential(
            nn.Linear(z_dim, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 1))

    def forward(self, z):
        return self.net(z).float()


class AdversarialAE(nn.Module):
    """The three networks and the losses that train them."""

    def __init__(self, z_dim=8, posterior="deterministic", num_filters=32, channels=1,
                 image_size=28):
        super().__init__()
        self.z_dim, self.image_shape = z_dim, (channels, image_size, image_size)
        self.encoder = Encoder(z_dim, posterior, num_filters, channels, image_size)
        self.decoder = Decoder(z_dim, num_filters, channels, image_size)
        self.discriminator = Discriminator(z_dim)
        # Orthogonal weights (Saxe et al., 2014, arXiv:1312.6120) with a ReLU's gain
        for layer in [*self.encoder.modules(), *self.decoder.modules()]:
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Measured on MNIST, whose pixels are mostly -1: if this bias is 0, the first steps push the
        # outputs to where tanh is flat, and 5 of 6 seeds never recovered; with -1 all learned.
        nn.init.constant_(self.decoder.net[-1].bias, -1)

    def forward(self, x):
        """Images [B, C, H, W] in [-1, 1] -> their reconstructions, and codes [B, z_dim]."""
        assert x.is_floating_point() and x.shape[1:] == self.image_shape, \
            f"expected floats {['B', *self.image_shape]}, not {x.dtype} {[*x.shape]}"
        z = self.encoder(x)
        return self.decoder(z), z

    def autoencoder_loss(self, x, recon, z, lam):
        """The loss of encoder and decoder -> loss = lam * rec + (1 - lam) * gen, rec, gen

        x, recon [B, C, H, W], z [B, z_dim], 0 <= lam <= 1; the results are means over the batch.
        rec is the squared error per pixel; gen, in nats, is low if codes fool the discriminator.

        Q2.2: against mode collapse, each kind of images must be reconstructed, or rec grows.
        Q2.3a: encoder and decoder lower the squared error. The discriminator raises log D of the
        prior's draws; no other network acts on it. The discriminator raises log(1 - D) of the
        codes; the encoder lowers it.
        Q2.3b: lambda 1 ignores the codes' distribution, lambda 0 ignores the reconstruction. If D
        can only guess, gen is ln 2 = 0.69; a trained model's rec is a few hundredths. So lambda has
        to be close to 1. (With a sum over pixels, not a mean, the same balance has another lambda.)
        """
        rec = F.mse_loss(recon, x)
        # -log D(E(x)) instead of log(1 - D(E(x))), as in Goodfellow et al. (2014): the same aim,
        # but with a gradient while the discriminator is not fooled at all.
        logits = self.discriminator(z)
        gen = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        return lam * rec + (1 - lam) * gen, rec, gen

    def discriminator_loss(self, z):
        """The loss of the discriminator: codes z [B, z_dim] -> cross-entropy in nats, accuracy

        Both are means over B draws of the prior ("real") and the B codes ("fake"). Pass codes that
        are detached from the encoder, which must not learn from this. If codes are distributed as
        the prior, the best possible loss is ln 2 and the accuracy 0.5: success, not failure.
        """
        both = torch.cat([sample_prior(*z.shape, z.device), z])  # [2 B, z_dim]
        real, fake = self.discriminator(both).chunk(2)  # [B, 1] each
        # The mean of -log D(real) and -log(1 - D(fake)), computed from their logits
        loss = (F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
                + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))) / 2
        accuracy = ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
        return loss, accuracy

    @torch.no_grad()
    def sample(self, n):
        """Decode n draws of the prior. -> images [n, C, H, W] in [-1, 1]"""
        return self.decoder(sample_prior(n, self.z_dim, next(self.parameters()).device))


# -- The distance of the codes to the prior ---------------------------------------------------


def sliced_wasserstein(a, b, num_projections=50):
    """Project two sets of points on random directions. -> the mean of their Wasserstein-1 distances

    a, b [N, z_dim], on the CPU. In one dimension the best way to move N points onto N others keeps
    their order, so the distance is the mean difference of the sorted values.
    """
    directions = F.normalize(torch.randn(num_projections, a.shape[1], dtype=a.dtype), dim=1)
    a, b = directions @ a.T, directions @ b.T  # [num_projections, N]
    return (a.sort().values - b.sort().values).abs().mean().item()


@torch.no_grad()
def evaluate(model, images):
    """uint8 images [N, C, H, W] -> mean squared error per pixel, and the distance of their codes to
    the prior, divided by that of two sets of the prior's draws: near 1 is a match. Sets torch's
    seed, so the noise is the same each time. (Each epoch of training sets its own seed.)"""
    torch.manual_seed(0)
    squared_error, codes = 0, []
    for part in images.split(100):
        x = to_float(part)
        recon, z = model(x)
        squared_error += F.mse_loss(recon, x) * len(x)
        codes.append(z)
    codes = torch.cat(codes)[:6000].cpu().double()  # more would have a smaller divisor
    distance, unit = 0, 0
    for _ in range(4):  # pairs of sets, for a more exact mean
        first, second = sample_prior(2 * len(codes), codes.shape[1], "cpu").double().chunk(2)
        distance += sliced_wasserstein(codes, first)
        unit += sliced_wasserstein(second, first)
    return (squared_error / len(images)).item(), distance / unit


# -- Pictures ---------------------------------------------------------------------------------


@torch.no_grad()
def save_pictures(model, images, labels, run, epoch):
    """Save pictures for Q2.4 to Q2.7 in the folder `run`: samples, ten reconstructions, codes with
    circles of N(0, I), and if z has two dimensions images decoded at the quantiles of N(0, I).
    images: uint8 [N, C, H, W]; labels: [N]"""
    torch.manual_seed(0)  # the same latents each time, so that epochs can be compared
    common.save_images(run / f"samples_epoch_{epoch:03d}.png", (model.sample(64) + 1) / 2,
                       columns=8)
    spread = torch.linspace(0, len(labels) - 1, min(10, len(labels))).long()
    originals = to_float(images[labels.argsort(stable=True)[spread]])  # one of each class
    both = torch.cat([originals, model(originals)[0]])
    common.save_images(run / f"reconstructions_epoch_{epoch:03d}.png", (both + 1) / 2,
                       columns=len(originals))
    codes = torch.cat([model.encoder(to_float(part)) for part in images.split(100)])
    common.save_scatter(run / "codes.png", codes, labels)
    if model.z_dim == 2:
        z = common.prior_grid(20).to(images.device)
        plane = torch.cat([model.decoder(row) for row in z.split(20)])  # saves memory
        common.save_images(run / "manifold.png", (plane + 1) / 2, columns=20, padding=0)


def main(argv=None):
    # -- Arguments, device and data -----------------------------------------------------------
    parser = argparse.ArgumentParser(
        prog="aae.py", description="Train an adversarial autoencoder on images.",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.number
    add("--z-dim", type=number(int, 1), default=8, help="latent dimensions")
    add("--num-filters", type=number(int, 1), default=32, help="channels of the first convolution")
    add("--posterior", choices=["deterministic", "gaussian", "universal"], default="deterministic",
        help="the encoder's output: a code, a Gaussian of codes, or a code that depends on noise")
    add("--lam", type=number(float, 0, 1), default=0.995, help="weight of the reconstruction")
    add("--ae-lr", type=number(float, 0), default=3e-3, help="highest rate of encoder and decoder")
    add("--d-lr", type=number(float, 0), default=5e-4, help="highest rate of the discriminator")
    common.add_image_flags(parser, batch_size=64)  # and --epochs --optimizer --dataset --image-size
    common.add_run_flags(parser)  # --limit --seed --device --no-amp --data-dir --out-dir --resume
    # With --resume, args are the run's, and checkpoint what its last.pt holds; else it is None.
    args, checkpoint = common.parse_args(parser, argv, may_change={"epochs", "ae_lr", "d_lr"})
    device, dtype = common.pick_device(args.device, amp=not args.no_amp)  # float32 or bfloat16
    # uint8 images [N, C, H, W] and, here only for plots, labels [N]; this sets args.image_size, too
    (train, train_labels), (val, val_labels), (test, test_labels) = common.load_images(args, device)

    # -- Model and optimizers -----------------------------------------------------------------
    torch.manual_seed(args.seed)
    config = {"z_dim": args.z_dim, "posterior": args.posterior, "num_filters": args.num_filters,
              "channels": train.shape[1], "image_size": args.image_size}
    # channels_last is fastest for convolutions, but wrong on MPS (pytorch issue 140902).
    layout = torch.channels_last if device.type != "mps" else torch.contiguous_format
    model = AdversarialAE(**config).to(device, memory_format=layout)
    # If you add an adversary, add its parameters to d_parameters; all others are ae_parameters. Of
    # these Muon is for matrices and kernels (see common.py), Adam for all that is left.
    d_parameters = [*model.discriminator.parameters()]
    ae_parameters = [p for p in model.parameters() if p not in set(d_parameters)]  # by identity
    matrices = [p for p in ae_parameters if args.optimizer == "muon" and p.dim() in (2, 4)]
    others = [p for p in ae_parameters if p not in set(matrices)]
    # common.cuda_graph needs rates in tensors, which the loop below fills, and capturable=True.
    ae_lr, d_lr = torch.zeros((), device=device), torch.zeros((), device=device)
    adam = dict(fused=True, capturable=True)
    # beta1 0.5 is usual for adversaries (Radford et al., 2016, arXiv:1511.06434).
    d_optimizer = torch.optim.Adam(d_parameters, d_lr, betas=(0.5, 0.99), **adam)
    ae_optimizers = [torch.optim.Adam(others, ae_lr, betas=(0.9, 0.99), **adam)]
    if matrices:
        ae_optimizers.append(common.Muon(matrices, ae_lr, weight_decay=0.1))
    optimizers = [d_optimizer, *ae_optimizers]
    rows, done = [], 0  # the results, one dict per epoch, and the number of epochs
    if checkpoint:
        rows, done = checkpoint["rows"], checkpoint["epoch"]
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for group in optimizer.param_groups:  # load_state_dict has replaced the rates
                group["lr"] = d_lr if optimizer is d_optimizer else ae_lr

    name = f"aae-z{args.z_dim}-lam{args.lam:g}"
    if args.posterior != "deterministic":
        name = f"{name}-{args.posterior}"
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
    # has no effect. A lambda that changes, or averaged weights, must be a tensor set by copy_.
    def train_step(indices):
        x = to_float(train[indices])  # [B, C, H, W]
        # -- Phase 1, encoder and decoder: reconstruct, and fool the discriminator ------------
        # One step for both aims, as in the practical's template (its text and the paper take two).
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            recon, z = model(x)
            loss, rec, gen = model.autoencoder_loss(x, recon, z, args.lam)
        # Gradients pass through the discriminator, but only `inputs` get a .grad.
        loss.backward(inputs=[p for p in ae_parameters if p.requires_grad])
        for optimizer in ae_optimizers:
            optimizer.step()
            optimizer.zero_grad()

        # -- Phase 2, discriminator: tell these codes from draws of the prior -----------------
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            disc, accuracy = model.discriminator_loss(z.detach())
        disc.backward()
        d_optimizer.step()
        d_optimizer.zero_grad()
        return torch.stack([rec, gen, disc, accuracy]).detach()

    if device.type == "cuda":
        train_step = common.cuda_graph(train_step)
    for epoch in range(done + 1, args.epochs + 1):
        # Random numbers depend on seed and epoch alone, so a resumed run draws the same numbers as
        # an uninterrupted one. (A pair of integers has the same hash in every process.)
        torch.manual_seed(hash((args.seed, epoch)))
        began = time.perf_counter()
        model.train()  # of no effect, until you add a layer such as Dropout
        sums = torch.zeros(4, device=device)  # of what train_step returns
        batches = torch.randperm(len(train)).to(device).split(args.batch_size)
        bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", disable=None, leave=False)
        for step, indices in enumerate(bar):
            # Rates rise in the first tenth of all epochs, then fall to 0.
            progress = (epoch - 1 + (step + 0.5) / len(batches)) / args.epochs
            scale = min(progress / 0.1, (1 - progress) / 0.9)
            ae_lr.fill_(args.ae_lr * scale)
            d_lr.fill_(args.d_lr * scale)
            sums += train_step(indices) * len(indices)
        train_mse, gen, disc, accuracy = (sums / len(train)).tolist()  # waits for the device
        seconds = time.perf_counter() - began
        model.eval()
        val_mse, distance = evaluate(model, val)
        rows.append({"epoch": epoch, "seconds": seconds, "images_per_s": len(train) / seconds,
                     "train_mse": train_mse, "gen_loss": gen, "disc_loss": disc,
                     "accuracy": accuracy, "val_mse": val_mse, "val_distance": distance})
        common.check_finite(model, rows[-1])
        common.write_json(run / "metrics.jsonl", *rows)
        common.save_checkpoint(run / "last.pt", {
            "model": model.state_dict(), "config": config, "epoch": epoch, "rows": rows,
            "args": vars(args), "optimizers": [o.state_dict() for o in optimizers]})
        print(f"epoch {epoch:3d}/{args.epochs} | train {train_mse:.4f} val {val_mse:.4f} mse | "
              f"distance {distance:.2f} | gen {gen:.3f} disc {disc:.3f} accuracy {accuracy:.3f} | "
              f"{len(train) / seconds / 1000:.2f}k img/s | {seconds:.1f} s", flush=True)
        if epoch in (1, 2, 5, args.epochs) or epoch % 10 == 0:
            save_pictures(model, val, val_labels, run, epoch)
            common.save_curves(run / "mse.png", rows, ["train_mse", "val_mse"],
                               "squared error per pixel")
            common.save_curves(run / "adversary.png", rows, ["gen_loss", "disc_loss", "accuracy"],
                               "nats; accuracy as a fraction")

    # -- Test the last model, because no single number says which epoch is best ---------------
    test_mse, test_distance = evaluate(model.eval(), test)
    print(f"test: mse {test_mse:.4f} | distance of the codes to the prior (best: near 1): "
          f"val {rows[-1]['val_distance']:.2f}, test {test_distance:.2f}")
    common.write_json(run / "test.json", {"epoch": rows[-1]["epoch"], "test_mse": test_mse,
                                          "test_distance": test_distance}, indent=2)
    print(f"{name} -> {run}")


if __name__ == "__main__":
    common.run_script(main)
