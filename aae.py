"""An adversarial autoencoder for MNIST (Makhzani et al., 2015, arXiv:1511.05644).

    Encoder E, decoder R (for reconstruction), and a discriminator D, which tells draws z of the
    prior N(0, I) from codes E(x). For a weight lambda between 0 and 1 (the assignment's
    Equation 15):

    min_{E,R}  lambda mean_x |x - R(E(x))|^2
               + (1 - lambda) max_D ( mean_z log D(z) + mean_x log(1 - D(E(x))) )

    |.|^2 is the mean over the pixels here, a few hundredths in a trained model, where what the
    encoder has to lose in the second term is about ln 2: hence a lambda close to 1.

    python aae.py                        8 latent dimensions, lambda 0.995, 20 epochs
    python aae.py --lam 1                the plain autoencoder
    python aae.py --z-dim 2              a latent space that can be looked at
    python aae.py --z-dim 20 --posterior gaussian
                                         a stochastic encoder; "universal" is another
    python aae.py --epochs 100           as long as the assignment asks
    python aae.py --resume runs/aae-z8-lam0.995
                                         go on with a stopped run
    python aae.py --eval runs/aae-z8-lam0.995
                                         print its test results, draw its samples and codes

A run leaves a folder in runs/: args.json, metrics.jsonl, last.pt, test.json, and as pictures the
losses by epoch, samples and reconstructions, and the codes beside the prior.

The assignment is the University of Amsterdam's Deep Learning Practical 3 (2023); "Equation" and
"Q" (question) refer to it. In the comments on shapes B is the batch size.
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

POSTERIORS = ("deterministic", "gaussian", "universal")

# ---------------------------------------------------------------------------------------------
# Networks


class Encoder(nn.Module):
    """E: images [B, 1, 28, 28] in [-1, 1] -> codes [B, z_dim], one draw from q(z|x) for each.

    The convolutions are those of Tutorial 9 of the UvA Deep Learning notebooks. q(z) is the mean
    of q(z|x) over the images (Q2.1), for the three posteriors of the paper's section 2:

    - "deterministic": z is a function of x, and all of q(z)'s randomness comes from the data.
    - "gaussian": q(z|x) = N(mean(x), diag(std(x)^2)), so q(z) is a mixture of Gaussians.
    - "universal": z is a function of x and of noise, so q(z|x) may take any shape.
    """

    def __init__(self, z_dim=8, posterior="deterministic"):
        super().__init__()
        assert posterior in POSTERIORS
        self.posterior = posterior
        c = 32
        self.net = nn.Sequential(
            nn.Conv2d(1, c, 3, stride=2, padding=1), nn.ReLU(),          # 28x28 -> 14x14
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(),                    # 14x14
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.ReLU(),      # 14x14 -> 7x7
            nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.ReLU(),            # 7x7
            nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1), nn.ReLU(),  # 7x7 -> 4x4
            nn.Flatten())                                                # [B, 2c * 4 * 4]
        features = 2 * c * 4 * 4
        if posterior == "deterministic":
            self.out = nn.Linear(features, z_dim)
        elif posterior == "gaussian":
            self.out = nn.Linear(features, 2 * z_dim)
        else:
            self.noise_dim = 32
            self.out = nn.Sequential(
                nn.Linear(features + self.noise_dim, 256), nn.ReLU(), nn.Linear(256, z_dim))

    def forward(self, x):
        h = self.net(x)
        if self.posterior == "universal":
            noise = torch.randn(len(h), self.noise_dim, device=h.device, dtype=h.dtype)
            h = torch.cat([h, noise], 1)
        z = self.out(h).float()  # autocast computes the layers in 16 bits; codes stay in 32
        if self.posterior == "gaussian":
            mean, log_std = z.chunk(2, dim=1)  # [B, z_dim] each
            # Bounded to -5..5, so that exp cannot overflow; unlike clamp, tanh passes gradients.
            z = mean + torch.exp(5 * torch.tanh(log_std / 5)) * torch.randn_like(mean)
        return z


class Decoder(nn.Module):
    """R: codes [B, z_dim] -> images [B, 1, 28, 28] in [-1, 1]."""

    def __init__(self, z_dim=8):
        super().__init__()
        c = 32
        up = dict(kernel_size=3, stride=2, padding=1)
        self.net = nn.Sequential(
            nn.Linear(z_dim, 2 * c * 4 * 4), nn.ReLU(),
            nn.Unflatten(1, (2 * c, 4, 4)),
            nn.ConvTranspose2d(2 * c, 2 * c, output_padding=0, **up), nn.ReLU(),  # 4x4 -> 7x7
            nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.ReLU(),                     # 7x7
            nn.ConvTranspose2d(2 * c, c, output_padding=1, **up), nn.ReLU(),      # 7x7 -> 14x14
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(),                             # 14x14
            nn.ConvTranspose2d(c, 1, output_padding=1, **up))                     # 14x14 -> 28x28

    def forward(self, z):
        return self.net(z).float().tanh()


class Discriminator(nn.Module):
    """D, as a logit: codes [B, z_dim] -> [B, 1], above 0 where they look drawn from the prior."""

    def __init__(self, z_dim=8):
        super().__init__()
        # No batch normalisation: the output for a code would depend on the rest of the batch.
        self.net = nn.Sequential(
            nn.Linear(z_dim, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 1))

    def forward(self, z):
        return self.net(z).float()


class AdversarialAE(nn.Module):
    """The three networks and the losses that train them."""

    def __init__(self, z_dim=8, posterior="deterministic"):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(z_dim, posterior)
        self.decoder = Decoder(z_dim)
        self.discriminator = Discriminator(z_dim)
        # Orthogonal weights (Saxe et al. 2014), with He's gain before a ReLU. With torch's default
        # weights the codes of different images differ by only about 0.001, with these by 0.1.
        for network in (self.encoder, self.decoder):
            layers = [layer for layer in network.modules() if hasattr(layer, "weight")]
            for layer in layers:
                nn.init.orthogonal_(layer.weight, gain=1 if layer is layers[-1] else math.sqrt(2))
                nn.init.zeros_(layer.bias)
        # Most pixels are background, near -1. Without this bias the first steps can push all
        # outputs so far down that tanh has no gradient left, and training does not recover.
        # tanh(-1) = -0.76 is near the mean of the images.
        nn.init.constant_(self.decoder.net[-1].bias, -1)

    def forward(self, x):
        """Images [B, 1, 28, 28] in [-1, 1] -> their reconstructions, and codes [B, z_dim]."""
        z = self.encoder(x)
        return self.decoder(z), z

    def autoencoder_loss(self, x, recon, z, lam):
        """The loss of encoder and decoder. x, recon [B, 1, 28, 28], z [B, z_dim], 0 <= lam <= 1

        -> lam * rec + (1 - lam) * gen, rec, gen, all of them means over the batch: rec is the
        squared error per pixel (Equation 18); gen, in nats, is low where the codes fool the
        discriminator.
        """
        rec = F.mse_loss(recon, x)
        # -log D(E(x)) instead of log(1 - D(E(x))), as in Goodfellow et al. (2014): the same aim,
        # but with a gradient while the discriminator is not fooled at all.
        gen = -F.logsigmoid(self.discriminator(z)).mean()
        return lam * rec + (1 - lam) * gen, rec, gen

    def discriminator_loss(self, z):
        """The loss of the discriminator. codes z [B, z_dim] -> cross-entropy in nats, accuracy

        z is to be detached from the encoder, which must not learn from this. Both results are
        means over the codes and as many draws of the prior. Where the codes are distributed as
        the prior, the best possible loss is ln 2 and the accuracy 0.5.
        """
        prior = torch.randn_like(z)
        real, fake = self.discriminator(torch.cat([prior, z])).chunk(2)  # [B, 1] each
        # The mean of Equations 17 and 16; the latter is printed with (1 - log D), a misprint for
        # the log(1 - D) of Equation 15, whose weight 1 - lambda moves no optimum of D and is left
        # out. With a logit a, log(1 - sigmoid(a)) = log sigmoid(-a).
        loss = -(F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean()) / 2
        accuracy = ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
        return loss, accuracy

    @torch.no_grad()
    def sample(self, n):
        """Decode n draws of the prior. -> images in [-1, 1], [n, 1, 28, 28]"""
        return self.decoder(torch.randn(n, self.z_dim, device=next(self.parameters()).device))


# ---------------------------------------------------------------------------------------------
# How far the codes are from the prior, and the samples from the images


def sliced_wasserstein(a, b, num_projections):
    """The mean Wasserstein-1 distance of two sets of points, projected on random directions.

    a, b [N, D] -> float. In one dimension the best way to move N points onto N others keeps
    their order, so the distance is the mean difference of the sorted values.
    """
    assert a.shape == b.shape
    directions = F.normalize(torch.randn(a.shape[1], num_projections, device=a.device), dim=0)
    a, b = a @ directions, b @ directions  # [N, num_projections]
    return (a.sort(0).values - b.sort(0).values).abs().mean().item()


def parzen_log_likelihood(samples, x, sigma):
    """log of the mean over `samples` of N(x; sample, sigma^2 I), in nats per image.

    samples [S, 1, 28, 28], x [N, 1, 28, 28], pixels in [0, 1] -> [N]. The paper reports this
    number, and it is computed for comparison with it alone. Choose no model by it: Theis et al.
    (2016, arXiv:1511.01844) show that it says little about the quality of samples (k-means centres
    score higher than images of the training set).
    """
    samples, x = samples.flatten(1), x.flatten(1)  # [S, M], [N, M]
    log_sums = []  # over the samples, for 500 images at a time: S * N distances are too many
    for part in x.split(500):
        log_sums.append((-torch.cdist(part, samples)**2 / (2 * sigma**2)).logsumexp(1))
    log_norm = math.log(len(samples)) + x.shape[1] / 2 * math.log(2 * math.pi * sigma**2)
    return torch.cat(log_sums) - log_norm


def to_float(images):
    """uint8 -> floats in [-1, 1]"""
    return images / 127.5 - 1


@torch.no_grad()
def evaluate(model, images):
    """Each image once, without autocast; a stochastic encoder draws one code for each.

    uint8 images [N, 1, 28, 28] -> mean squared error per pixel, codes [N, z_dim]
    """
    torch.manual_seed(0)  # the same noise every time; a training step sets a seed of its own
    squared_error, codes = 0, []
    for part in images.split(500):
        x = to_float(part)
        recon, z = model(x)
        squared_error += F.mse_loss(recon, x) * len(x)
        codes.append(z)
    return (squared_error / len(images)).item(), torch.cat(codes)


def code_moments(codes):
    """The ranges, over the dimensions, of the means and standard deviations of codes [N, z_dim]."""
    means, stds = codes.mean(0), codes.std(0, correction=0)  # [z_dim] each
    return {"code_mean_min": means.min().item(), "code_mean_max": means.max().item(),
            "code_std_min": stds.min().item(), "code_std_max": stds.max().item()}


def format_moments(moments):
    return ("codes mean {code_mean_min:.2f}..{code_mean_max:.2f} "
            "std {code_std_min:.2f}..{code_std_max:.2f}").format(**moments)


# ---------------------------------------------------------------------------------------------
# Pictures


@torch.no_grad()
def visualize_manifold(decoder, grid_size=20):
    """What a decoder of two latent dimensions draws for each point of a grid.

    The points are the percentiles (i + 0.5) / grid_size of the prior, z[0] growing to the right
    and z[1] upwards. -> [grid_size**2, 1, 28, 28] in [-1, 1], row by row
    """
    percentiles = (torch.arange(grid_size) + 0.5) / grid_size
    ticks = torch.special.ndtri(percentiles)  # the normal distribution's inverse CDF
    z1, z0 = torch.meshgrid(ticks.flip(0), ticks, indexing="ij")
    z = torch.stack([z0.flatten(), z1.flatten()], 1)  # [grid_size**2, 2]
    return decoder(z.to(next(decoder.parameters()).device))


@torch.no_grad()
def draw_images(model, images, labels, run, heading, epoch, suffix=""):
    """Samples, and reconstructions of one of `images` for each label (Q2.4 to Q2.7)."""
    torch.manual_seed(0)  # the same latents every time, so that epochs can be compared
    samples = (model.sample(64) + 1) / 2
    common.save_image(run / f"samples{suffix}.png", common.tile(samples, 8),
                      f"{heading}\nsamples after {epoch:g} epochs")

    first = [(labels == digit).nonzero()[0, 0] for digit in labels.unique()]
    originals = to_float(images[torch.stack(first).to(images.device)])
    pairs = (torch.cat([originals, model(originals)[0]]) + 1) / 2
    common.save_image(run / f"reconstructions{suffix}.png", common.tile(pairs, len(originals)),
                      f"{heading}\noriginals and reconstructions after {epoch:g} epochs")


def draw_codes(model, codes, labels, run, heading):
    """`codes` [N, z_dim] beside the prior, and for z_dim 2 what the decoder makes of its plane."""
    codes = codes.cpu()
    reach = max(4, codes.abs().max().item())
    if model.z_dim == 2:
        manifold = (visualize_manifold(model.decoder) + 1) / 2
        common.save_image(run / "manifold.png", common.tile(manifold, 20),
                          f"{heading}\nwhat the decoder draws over the prior's percentiles")
        figure = common.new_figure(6, 6, f"{heading}\ncodes of {len(codes):,} images; circles: "
                                   "1, 2 and 3 sigma of the prior")
        axes = figure.add_subplot(xlabel="z[0]", ylabel="z[1]", aspect="equal")
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
        points = axes.scatter(*codes.T, c=labels, s=2, cmap="tab10", vmin=0, vmax=9)
        angle = torch.linspace(0, 2 * math.pi, 200)
        for sigma in (1, 2, 3):
            axes.plot(sigma * angle.cos(), sigma * angle.sin(), "k", linewidth=1)
        figure.legend(*points.legend_elements(), loc="outside right center")
    else:
        shown = min(model.z_dim, 20)
        rows, columns = math.ceil(shown / 4), min(shown, 4)
        figure = common.new_figure(2.5 * columns + 1, 1.7 * rows + 0.7, f"{heading}\ncodes of "
                                   f"{len(codes):,} images; line: the prior")
        z = torch.linspace(-reach, reach, 200)
        density = torch.exp(-z**2 / 2) / math.sqrt(2 * math.pi)
        for i in range(shown):
            mean, std = codes[:, i].mean(), codes[:, i].std(correction=0)
            axes = figure.add_subplot(rows, columns, i + 1, yticks=[])
            axes.hist(codes[:, i].numpy(), bins=60, range=(-reach, reach), density=True)
            axes.plot(z, density, "k", linewidth=1)
            axes.set_ylim(0, 0.6)  # half as much again as the prior's peak
            axes.set_title(f"z[{i}]: mean {mean:.2f}, std {std:.2f}", fontsize="small")
    figure.savefig(run / "codes.png")


def draw_curves(rows, run, heading, test_mse=None):
    """The losses by epoch, and the test value as a line once it is known."""
    def column(name):
        return [row[name] for row in rows]

    common.save_curves(
        run / "mse.png", f"{heading}\nreconstruction", "mean squared error per pixel in [-1, 1]",
        column("epoch"), {"train": column("train_mse"), "val": column("val_mse")},
        {"test": test_mse})
    if "disc_loss" in rows[0]:
        common.save_curves(
            run / "adversary.png", f"{heading}\nencoder against discriminator",
            "nats; accuracy as a fraction", column("epoch"),
            {"generator": column("gen_loss"), "discriminator": column("disc_loss"),
             "accuracy": column("disc_accuracy")},
            {"perfect match, losses:": math.log(2), "perfect match, accuracy:": 0.5})


# ---------------------------------------------------------------------------------------------
# Training


def fit(model, data, args, run, dtype, heading, state=None):
    """Fit `model` to data.train; `state`, the content of a last.pt, is where to go on from."""
    device = data.train.device
    autoencoder = [*model.encoder.parameters(), *model.decoder.parameters()]
    # Without weight decay the autoencoder overfits: its error on new images is higher.
    ae_optimizer = torch.optim.AdamW(autoencoder, lr=args.ae_lr, betas=(0.9, 0.99),
                                     weight_decay=0.1, fused=True)
    # beta1 0.5 is usual for a discriminator (Radford et al. 2016): its task changes all the time.
    d_optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=args.d_lr,
                                   betas=(0.5, 0.99), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    adversarial = args.lam < 1  # Q2.3b: with lambda 1 nothing is asked of the codes
    # What is summed over an epoch, in the order of `parts` below
    losses = ["train_mse", *(["gen_loss", "disc_loss", "disc_accuracy"] if adversarial else [])]
    step, seconds, rows = 0, 0.0, []
    sums = torch.zeros(len(losses), device=device)  # of the losses over the epoch's images so far
    if state:
        ae_optimizer.load_state_dict(state["optimizer"]["autoencoder"])
        d_optimizer.load_state_dict(state["optimizer"]["discriminator"])
        if state["scaler"]:  # empty after training without float16
            scaler.load_state_dict(state["scaler"])
        step, seconds, rows = (state[key] for key in ("step", "seconds", "rows"))
        sums = state["sums"].to(device)
        common.write_metrics(run, rows)
    steps_per_epoch = math.ceil(len(data.train) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch

    def save_last():
        common.save_checkpoint(run / "last.pt", {
            "model": model.state_dict(), "optimizer": {
                "autoencoder": ae_optimizer.state_dict(),
                "discriminator": d_optimizer.state_dict()},
            "scaler": scaler.state_dict(), "step": step, "seconds": seconds, "rows": rows,
            "sums": sums, "args": vars(args)})

    def stop_here():
        print(f"stopped after step {step}; go on with: python aae.py --resume {run}")
        sys.exit(130)

    if step == 0:
        save_last()
        val_mse, codes = evaluate(model, data.val)
        print(f"epoch   0/{args.epochs} | untrained    | val {val_mse:.4f} | "
              f"{format_moments(code_moments(codes))}", flush=True)
        draw_images(model, data.val, data.val_labels, run, heading, 0, "_epoch_000")
        draw_codes(model, codes, data.val_labels, run, heading)

    with common.StopRequest() as stop:
        for epoch in range(len(rows) + 1, args.epochs + 1):
            began, seen = time.perf_counter(), 0
            order = common.epoch_order(len(data.train), args.seed, epoch, device)
            batches = order.split(args.batch_size)
            batches = batches[step - (epoch - 1) * steps_per_epoch:]  # resumed within an epoch
            bar = tqdm(batches, f"epoch {epoch}/{args.epochs}", unit=" img",
                       unit_scale=args.batch_size, disable=None, leave=False)
            for indices in bar:
                # Both rates rise in the first tenth of the steps and fall to zero in the rest.
                progress = (step + 0.5) / total_steps
                scale = min(progress / 0.1, (1 - progress) / 0.9)
                ae_optimizer.param_groups[0]["lr"] = args.ae_lr * scale
                d_optimizer.param_groups[0]["lr"] = args.d_lr * scale
                common.seed_step(device, args.seed, step)  # so a resumed run draws the same
                x = to_float(data.train[indices])  # [B, 1, 28, 28]

                # -- Phase 1, encoder and decoder: reconstruct, and fool the discriminator --------
                # In the paper the autoencoder learns to reconstruct, then the discriminator
                # learns, then the encoder learns to fool it. The assignment joins the first and
                # the third, and has the discriminator first; here it is second, on the codes of
                # the same pass of the encoder. Both orders ended equally well.
                with autocast:
                    recon, z = model(x)
                    loss, rec, gen = model.autoencoder_loss(x, recon, z, args.lam)
                # The gradient passes through the discriminator; its weights get none.
                scaler.scale(loss).backward(inputs=autoencoder)
                scaler.step(ae_optimizer)
                ae_optimizer.zero_grad()

                # -- Phase 2, discriminator: tell these codes from draws of the prior -------------
                if adversarial:
                    with autocast:
                        disc, accuracy = model.discriminator_loss(z.detach())
                    scaler.scale(disc).backward()
                    scaler.step(d_optimizer)
                    d_optimizer.zero_grad()
                scaler.update()

                parts = [rec, gen, disc, accuracy] if adversarial else [rec]
                sums += torch.stack(parts).detach() * len(x)
                step += 1
                seen += len(x)
                if step % 50 == 0:  # not each time: reading a loss waits for the device
                    bar.set_postfix_str(f"mse {rec.item():.4f}")
                    if not sums.isfinite().all():
                        raise common.UserError(
                            f"a loss is not finite by step {step}: start again with a lower "
                            f"--ae-lr or --d-lr ({run / 'last.pt'} keeps the last good model)")
                if stop.asked and step < epoch * steps_per_epoch:  # else at the epoch's end, below
                    bar.close()
                    seconds += time.perf_counter() - began
                    save_last()
                    stop_here()
            train = dict(zip(losses, (sums / len(data.train)).tolist(), strict=True))
            sums.zero_()
            images_per_s = seen / (time.perf_counter() - began)
            val_mse, codes = evaluate(model, data.val)
            moments = code_moments(codes)
            seconds += time.perf_counter() - began
            rows.append({"epoch": epoch, "step": step, "seconds": round(seconds, 2),
                         "images_per_s": round(images_per_s), **train, "val_mse": val_mse,
                         **moments})
            save_last()
            common.write_metrics(run, rows)
            players = ("gen {gen_loss:.3f} disc {disc_loss:.3f} accuracy {disc_accuracy:.3f} | "
                       .format(**train) if adversarial else "")
            print(f"epoch {epoch:3d}/{args.epochs} | train {train['train_mse']:.4f} | "
                  f"val {val_mse:.4f} | {players}{format_moments(moments)} | "
                  f"{images_per_s / 1000:.2f}k img/s | {seconds:.1f} s", flush=True)
            if epoch in (1, 2, 5) or epoch % 10 == 0:
                draw_images(model, data.val, data.val_labels, run, heading, epoch,
                            f"_epoch_{epoch:03d}")
                draw_codes(model, codes, data.val_labels, run, heading)
                draw_curves(rows, run, heading)
            if stop.asked:
                stop_here()
    return rows


@torch.no_grad()
def report_test(model, data):
    """Print the model's results on the test images. -> dict of them, codes [N, z_dim]"""
    torch.set_float32_matmul_precision("highest")  # no TF32 in the distances below
    mse, codes = evaluate(model, data.test)
    torch.manual_seed(1)  # with evaluate's 0 the prior would repeat a Gaussian encoder's noise
    distance, floor = [], []
    for _ in range(10):
        prior, more_prior = torch.randn_like(codes), torch.randn_like(codes)
        distance.append(sliced_wasserstein(codes, prior, 100))
        floor.append(sliced_wasserstein(more_prior, prior, 100))
    distance, floor = sum(distance) / 10, sum(floor) / 10
    moments = code_moments(codes)
    print(f"test: mse {mse:.4f} | {format_moments(moments)} | sliced Wasserstein distance to the "
          f"prior {distance:.4f}, {distance / floor:.1f} times that between draws of the prior")

    # As many samples as there are test images: 10,000, as in the paper.
    samples = torch.cat([model.sample(len(part)) for part in data.test.split(500)])
    samples = (samples + 1) / 2
    val = data.val[:1000] / 255
    sigmas = [10**(i / 20 - 1) for i in range(21)]  # 0.1 to 1
    sigma = max(sigmas, key=lambda s: parzen_log_likelihood(samples, val, s).mean().item())
    parzen = parzen_log_likelihood(samples, data.test / 255, sigma).mean().item()
    print(f"Parzen window of {len(samples):,} samples, sigma {sigma:.2f}: {parzen:.0f} nats per "
          "test image (the paper, with 10,000 samples of MNIST: 340 +- 2)", flush=True)
    return {"test_mse": mse, **moments, "sliced_wasserstein": distance,
            "sliced_wasserstein_floor": floor, "parzen": parzen, "parzen_sigma": sigma}, codes


def parse_args(argv=None, run_args=None):
    parser = argparse.ArgumentParser(
        prog="aae.py", description="Train an adversarial autoencoder on MNIST.",
        allow_abbrev=False)
    default = "(default: %(default)s)"
    group = parser.add_argument_group("model")
    group.add_argument("--z-dim", type=common.integer(1), default=8,
                       help=f"latent dimensions {default}")
    group.add_argument("--posterior", choices=POSTERIORS, default="deterministic",
                       help=f"what the encoder makes of an image: a code, a Gaussian to draw it "
                       f"from, or a code that also depends on noise {default}")
    group = parser.add_argument_group("training")
    group.add_argument("--lam", type=common.number(0, 1), default=0.995,
                       help="weight of the reconstruction, from 0 to 1; the rest is that of "
                       f"fooling the discriminator, and with 1 there is none {default}")
    group.add_argument("--epochs", type=common.integer(1), default=20,
                       help=f"passes over the training images {default}")
    group.add_argument("--batch-size", type=common.integer(1), default=32,
                       help=f"images a step {default}")
    group.add_argument("--ae-lr", type=common.positive, default=3e-3,
                       help=f"highest learning rate of encoder and decoder {default}")
    group.add_argument("--d-lr", type=common.positive, default=1e-4,
                       help=f"highest learning rate of the discriminator {default}")
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
                       "holds something gets a suffix (default: runs/aae-z8-lam0.995 for "
                       "--z-dim 8 --lam 0.995)")
    group.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, under its own "
                       "arguments; only --device and --data-dir may be given beside it")
    group.add_argument("--eval", metavar="DIR", help="print the test figures of the run in DIR and "
                       "draw its pictures, without training")
    parser.set_defaults(script="aae.py")
    return common.parse_run_args(parser, argv, run_args)


@common.command("aae.py")
def main(argv=None):
    args, state = parse_args(argv), None
    if args.resume is not None or args.eval is not None:
        run = Path(args.eval if args.resume is None else args.resume)
        state = common.load_checkpoint(run / "last.pt", "aae.py")
        args = parse_args(argv, state["args"])  # the run's own, but for what is given now
    device, dtype = common.pick_device(args.device, not args.no_amp)
    data = common.load_mnist(args.dataset, args.data_dir, args.limit, device)
    stand_in = data.name == "glyphs" and args.dataset is None
    args.dataset = data.name

    name = f"aae-z{args.z_dim}-lam{args.lam:g}"
    title = common.TITLES.get(data.name, data.name)
    heading = f"AAE on {title}, z {args.z_dim}, lambda {args.lam:g}"
    if args.posterior != "deterministic":
        name += f"-{args.posterior}"
        heading += f", {args.posterior}"
    if data.name != "mnist":
        name += f"-{data.name}"

    torch.manual_seed(args.seed)
    model = AdversarialAE(args.z_dim, args.posterior)
    if state:
        model.load_state_dict(state["model"])
    else:
        run = common.new_run_folder(args.out_dir or f"runs/{name}")
        common.write_text(run / "args.json", json.dumps(vars(args), indent=2) + "\n")
    model.to(device, memory_format=torch.channels_last)  # the layout convolutions are fastest in
    steps_per_epoch = math.ceil(len(data.train) / args.batch_size)
    print(f"{heading}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} in "
          f"{str(dtype).removeprefix('torch.')}; {len(data.train):,} train, {len(data.val):,} val, "
          f"{len(data.test):,} test images; {args.epochs} epochs of {steps_per_epoch:,} steps; "
          f"-> {run}", flush=True)

    if args.eval is None:
        rows = fit(model, data, args, run, dtype, heading, state)
        epoch = args.epochs
    else:
        epoch = state["step"] / steps_per_epoch
        print(f"the run's state after {epoch:g} of {args.epochs} epochs:")
    results, codes = report_test(model, data)
    draw_images(model, data.val, data.val_labels, run, heading, epoch)
    draw_codes(model, codes, data.test_labels, run, heading)
    if args.eval is None:
        draw_curves(rows, run, heading, results["test_mse"])
        results |= {"epoch": epoch, "seconds": rows[-1]["seconds"], "device": str(device),
                    "torch": torch.__version__}
        common.write_text(run / "test.json", json.dumps(results, indent=2) + "\n")
    if stand_in:
        print("warning: no MNIST, so all this is of the built-in glyphs", file=sys.stderr)
    print(run)


if __name__ == "__main__":
    main()
