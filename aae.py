"""An adversarial autoencoder for MNIST (Makhzani et al., 2015, arXiv:1511.05644).

    Encoder E, decoder R (for reconstruction), and a discriminator D that tells draws z of the
    prior N(0, I) from codes E(x). With a weight lambda between 0 and 1:

    min_{E,R}  lambda mean_x |x - R(E(x))|^2
               + (1 - lambda) max_D ( mean_z log D(z) + mean_x log(1 - D(E(x))) )

    |.|^2 is the squared error averaged over the pixels. The encoder is trained with -log D(E(x))
    instead of the last term. Where D can only guess this is ln 2 = 0.69, while the squared error of
    a trained model is a few hundredths. So the error counts only if lambda is close to 1.

    python aae.py                        8 latent dimensions, lambda 0.995, 20 epochs
    python aae.py --lam 1                a plain autoencoder
    python aae.py --z-dim 2              a latent space that can be looked at
    python aae.py --z-dim 20 --posterior gaussian
                                         a stochastic encoder (or --posterior universal)
    python aae.py --resume runs/aae-z8-lam0.995
                                         go on with a run that was stopped; add --epochs 100
                                         to go on beyond its end, until 100 are done

A run leaves a folder in runs/: args.json, metrics.jsonl (a row per epoch), last.pt (the last
model: no single figure says which is best), test.json, and as pictures the losses by epoch,
samples, reconstructions, and the codes beside the prior. --resume of a finished run prints its
test figures and draws the pictures again.

The model is that of the University of Amsterdam's Deep Learning Practical 3 (2023). Comments that
begin with Q2.1, Q2.3, ... answer its questions. In comments on shapes B is the batch size.
"""

import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import common

POSTERIORS = ("deterministic", "gaussian", "universal")


def to_float(images):
    """uint8 -> floats in [-1, 1]"""
    return images / 127.5 - 1


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
    """E: images [B, 1, 28, 28] in [-1, 1] -> codes [B, z_dim], one draw from q(z|x) for each.

    The convolutions are those of Tutorial 9 of the UvA Deep Learning notebooks. q(z|x) is one of
    the three posteriors of the paper's section 2. Q2.1: q(z) is the mean of q(z|x) over the images.

    - "deterministic": z is a function of x, so all randomness of q(z) comes from the data.
    - "gaussian": q(z|x) = N(mean(x), diag(std(x)^2)), so q(z) is a mixture of Gaussians.
    - "universal": z is a function of x and of noise, so q(z|x) may take any shape.
    """

    def __init__(self, z_dim=8, posterior="deterministic", num_filters=32):
        super().__init__()
        assert posterior in POSTERIORS
        self.posterior = posterior
        c = num_filters
        self.net = nn.Sequential(
            init(nn.Conv2d(1, c, 3, stride=2, padding=1)), nn.ReLU(),          # 28x28 -> 14x14
            init(nn.Conv2d(c, c, 3, padding=1)), nn.ReLU(),                    # 14x14
            init(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)), nn.ReLU(),      # 14x14 -> 7x7
            init(nn.Conv2d(2 * c, 2 * c, 3, padding=1)), nn.ReLU(),            # 7x7
            init(nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1)), nn.ReLU(),  # 7x7 -> 4x4
            nn.Flatten())                                                      # [B, 2c * 4 * 4]
        features = 2 * c * 4 * 4
        self.noise_dim = 32  # for the universal posterior
        if posterior == "deterministic":
            self.out = init(nn.Linear(features, z_dim), gain=1)
        elif posterior == "gaussian":
            self.out = init(nn.Linear(features, 2 * z_dim), gain=1)
        else:
            self.out = nn.Sequential(init(nn.Linear(features + self.noise_dim, 256)), nn.ReLU(),
                                     init(nn.Linear(256, z_dim), gain=1))

    def forward(self, x):
        h = self.net(x)
        if self.posterior == "universal":
            noise = torch.randn(len(h), self.noise_dim, device=h.device, dtype=h.dtype)
            h = torch.cat([h, noise], 1)
        out = at_least_float32(self.out(h))
        if self.posterior != "gaussian":
            return out
        mean, log_std = out.chunk(2, dim=1)  # [B, z_dim] each
        # The log std is bounded to -5..5, so that its exp cannot overflow; smoothly, as clamp would
        # leave no gradient to a value that once got outside. Q2.7: noise costs reconstruction, so
        # the encoder makes the std as small as it can: at 20 dimensions 0.009 after 5 epochs, near
        # the lowest that is allowed, e^-5 = 0.007.
        return mean + torch.exp(5 * torch.tanh(log_std / 5)) * torch.randn_like(mean)


class Decoder(nn.Module):
    """R: codes [B, z_dim] -> images [B, 1, 28, 28] in [-1, 1]."""

    def __init__(self, z_dim=8, num_filters=32):
        super().__init__()
        c = num_filters
        up = dict(kernel_size=3, stride=2, padding=1)
        self.net = nn.Sequential(
            init(nn.Linear(z_dim, 2 * c * 4 * 4)), nn.ReLU(),
            nn.Unflatten(1, (2 * c, 4, 4)),
            init(nn.ConvTranspose2d(2 * c, 2 * c, output_padding=0, **up)), nn.ReLU(),  # -> 7x7
            init(nn.Conv2d(2 * c, 2 * c, 3, padding=1)), nn.ReLU(),                     # 7x7
            init(nn.ConvTranspose2d(2 * c, c, output_padding=1, **up)), nn.ReLU(),      # -> 14x14
            init(nn.Conv2d(c, c, 3, padding=1)), nn.ReLU(),                             # 14x14
            init(nn.ConvTranspose2d(c, 1, output_padding=1, **up), gain=1))             # -> 28x28
        # Most pixels are -1, the background. With a bias of 0 the first steps push all outputs so
        # far down that tanh has no gradient left, and 5 of 6 seeds never recovered. With -1 all 6
        # learned; tanh(-1) = -0.76 is near the images' mean.
        nn.init.constant_(self.net[-1].bias, -1)

    def forward(self, z):
        return at_least_float32(self.net(z)).tanh()


class Discriminator(nn.Module):
    """D, as a logit: codes [B, z_dim] -> [B, 1], above 0 where they look drawn from the prior."""

    def __init__(self, z_dim=8):
        super().__init__()
        # No batch normalisation: with it the output for a code would depend on the other codes of
        # the batch.
        self.net = nn.Sequential(
            nn.Linear(z_dim, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 512), nn.LeakyReLU(0.2),
            nn.Linear(512, 1))

    def forward(self, z):
        return at_least_float32(self.net(z))


class AdversarialAE(nn.Module):
    """The three networks and the losses that train them."""

    def __init__(self, z_dim=8, posterior="deterministic", num_filters=32):
        super().__init__()
        self.z_dim = z_dim
        self.encoder = Encoder(z_dim, posterior, num_filters)
        self.decoder = Decoder(z_dim, num_filters)
        self.discriminator = Discriminator(z_dim)

    def forward(self, x):
        """Images [B, 1, 28, 28] in [-1, 1] -> their reconstructions, and codes [B, z_dim]."""
        z = self.encoder(x)
        return self.decoder(z), z

    def autoencoder_loss(self, x, recon, z, lam):
        """The loss of encoder and decoder, lam * rec + (1 - lam) * gen. -> loss, rec, gen

        x, recon [B, 1, 28, 28], z [B, z_dim], 0 <= lam <= 1; the results are means over the batch.
        rec is the squared error per pixel; gen, in nats, is low where the codes fool the
        discriminator.
        """
        # Q2.3b: with lambda 1 nothing is asked of the codes, with 0 nothing of the images.
        rec = F.mse_loss(recon, x)
        if lam == 1:
            return rec, rec, torch.zeros_like(rec)
        # -log D(E(x)) instead of log(1 - D(E(x))), as in Goodfellow et al. (2014): the same aim,
        # but with a gradient while the discriminator is not fooled at all.
        fake = self.discriminator(z)
        gen = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
        return lam * rec + (1 - lam) * gen, rec, gen

    def discriminator_loss(self, z):
        """The loss of the discriminator: codes z [B, z_dim] -> cross-entropy in nats, accuracy

        Both are means over the codes and as many draws of the prior. Detach z from the encoder,
        which must not learn from this. Where codes are distributed as the prior, the best possible
        loss is ln 2 and the accuracy 0.5.
        """
        real, fake = self.discriminator(torch.cat([torch.randn_like(z), z])).chunk(2)  # [B, 1] each
        # -(mean log D(z) + mean log(1 - D(E(x)))) / 2. The objective's factor 1 - lambda is left
        # out: it would not change which D is best.
        loss = (F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
                + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))) / 2
        accuracy = ((real > 0).float().mean() + (fake <= 0).float().mean()) / 2
        return loss, accuracy

    @torch.no_grad()
    def sample(self, n):
        """Decode n draws of the prior. -> images [n, 1, 28, 28] in [-1, 1]"""
        weight = self.decoder.net[0].weight
        return self.decoder(torch.randn(n, self.z_dim, device=weight.device, dtype=weight.dtype))


# -- How far the codes are from the prior, and the samples from the images --------------------


def sliced_wasserstein(a, b, num_projections=200):
    """The mean Wasserstein-1 distance of two sets of points, projected on random directions.

    a, b [N, z_dim] -> float. In one dimension the best way to move N points onto N others keeps
    their order, so the distance is the mean difference of the sorted values.
    """
    assert a.shape == b.shape
    directions = F.normalize(torch.randn(a.shape[1], num_projections, dtype=a.dtype,
                                         device=a.device), dim=0)
    a, b = a @ directions, b @ directions  # [N, num_projections]
    return (a.sort(0).values - b.sort(0).values).abs().mean().item()


def maximum_mean_discrepancy(a, b):
    """sqrt(mean k(a, a') + mean k(b, b') - 2 mean k(a, b)), the MMD of two sets of points (Gretton
    et al., 2012, JMLR 13): near 0 where both have the same distribution. a, b [N, z_dim] -> float

    k(a, b) = exp(-|a - b|^2 / (2 w^2)), with the median distance of 1,000 points of b as w.
    """
    width = F.pdist(b[:1000]).median()

    def mean_kernel(x, y):  # in parts: all N^2 distances at once would take too much memory
        sums = [torch.exp(-torch.cdist(part, y)**2 / (2 * width**2)).sum() for part in x.split(500)]
        return sum(sums) / (len(x) * len(y))

    return (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)).sqrt().item()


def parzen_log_likelihood(samples, x, sigmas):
    """log of the mean over `samples` of N(x; sample, sigma^2 I), in nats per image.

    samples [S, 1, 28, 28], x [N, 1, 28, 28], pixels in [0, 1], a list of G sigmas -> [G, N]. Only
    for comparison with the paper, which reports it. Choose no model by it: Theis et al. (2016,
    arXiv:1511.01844) show that it says little about the quality of samples (k-means centres score
    higher than images of the training set).
    """
    samples, x = samples.flatten(1), x.flatten(1)  # [S, 784], [N, 784]
    results = []
    for part in x.split(500):  # all S * N distances at once would take too much memory
        squared = torch.cdist(part, samples)**2  # [500, S]
        results.append(torch.stack([
            (-squared / (2 * sigma**2)).logsumexp(1) - math.log(len(samples))
            - x.shape[1] / 2 * math.log(2 * math.pi * sigma**2) for sigma in sigmas]))
    return torch.cat(results, 1)


def times_the_floor(distance, codes, repeats=5):
    """How far codes [N, z_dim] are from the prior. Even two sets of N draws of the prior are some
    distance apart, the floor. -> mean distance(codes, draws) / mean floor, near 1 for a match"""
    codes = codes.double().cpu()  # in float64, without the rounding of TF32
    # Not evaluate's seed 0: a stochastic encoder's noise would be the same numbers.
    torch.manual_seed(1)
    draws, others = torch.randn(repeats, 2, *codes.shape).double().unbind(1)
    return (sum(distance(codes, b) for b in draws)
            / sum(distance(a, b) for a, b in zip(others, draws, strict=True)))


@torch.no_grad()
def evaluate(model, images):
    """Each image once, without autocast; a stochastic encoder draws one code for each.

    uint8 images [N, 1, 28, 28] -> mean squared error per pixel, codes [N, z_dim]
    """
    torch.manual_seed(0)  # the same noise each time; main seeds anew for each epoch
    squared_error, codes = 0, []
    for part in images.split(500):
        x = to_float(part)
        recon, z = model(x)
        squared_error += F.mse_loss(recon, x) * len(x)
        codes.append(z)
    return (squared_error / len(images)).item(), torch.cat(codes)


MOMENTS = ("codes mean {code_mean_min:.2f}..{code_mean_max:.2f} "
           "std {code_std_min:.2f}..{code_std_max:.2f}")


def code_moments(codes):
    """The ranges, over the dimensions, of the means and standard deviations of codes [N, z_dim]."""
    mean, std = codes.mean(0), codes.std(0, correction=0)  # [z_dim] each
    return {"code_mean_min": mean.min().item(), "code_mean_max": mean.max().item(),
            "code_std_min": std.min().item(), "code_std_max": std.max().item()}


@torch.no_grad()
def test_figures(model, data):
    """Print and return the figures of a finished model. -> dict, test codes [N, z_dim]"""
    mse, codes = evaluate(model, data.test)
    figures = {"test_mse": mse, **code_moments(codes)}
    print(f"test: mse {mse:.4f} | {MOMENTS.format(**figures)}")
    # MNIST's test images are by other writers than its training images, so their codes are spread
    # a little differently. The codes of validation images show the match better.
    for part, z in (("val", evaluate(model, data.val)[1]), ("test", codes)):
        figures[f"{part}_sliced_wasserstein"] = times_the_floor(sliced_wasserstein, z)
        # The MMD's time grows with N^2, so of many codes only every fourth. (Not the first
        # quarter, as MNIST's test images are sorted by groups of writers.)
        few = z[::4] if len(z) > 1000 else z
        figures[f"{part}_mmd"] = times_the_floor(maximum_mean_discrepancy, few)
    print("codes to the prior, in multiples of the distance between two sets of its draws: sliced "
          "Wasserstein {val_sliced_wasserstein:.2f} val {test_sliced_wasserstein:.2f} test | MMD "
          "{val_mmd:.2f} val {test_mmd:.2f} test".format(**figures))

    # As many samples as test images (10,000 as in the paper), and sigma chosen on validation images
    samples = torch.cat([model.sample(len(part)) for part in data.test.split(500)])
    samples, val, test = (images.double().cpu() for images in (
        (samples + 1) / 2, data.val[:1000] / 255, data.test / 255))
    sigmas = [10**(i / 20 - 1) for i in range(21)]  # 0.1 to 1
    sigma = sigmas[parzen_log_likelihood(samples, val, sigmas).mean(1).argmax()]
    parts = tqdm(test.split(500), "Parzen window", disable=None, leave=False)
    parzen = torch.cat([parzen_log_likelihood(samples, x, [sigma]) for x in parts], 1).mean().item()
    print(f"Parzen window of {len(samples):,} samples, sigma {sigma:.2f}: {parzen:.0f} nats per "
          "test image (the paper, with 10,000 samples of MNIST: 340 +- 2)", flush=True)
    return figures | {"parzen": parzen, "parzen_sigma": sigma}, codes


# -- Pictures ---------------------------------------------------------------------------------


@torch.no_grad()
def draw_pictures(model, images, labels, codes, run, heading, epoch, split="validation"):
    """Samples, reconstructions of one image of each label (Q2.4 to Q2.7), and the `codes`
    [N, z_dim] of the split's images beside the prior."""
    torch.manual_seed(0)  # the same latents each time, so that epochs can be compared
    common.save_image(run / f"samples_epoch_{epoch:03d}.png",
                      common.tile((model.sample(64) + 1) / 2, 8),
                      f"{heading}\nsamples after {epoch} epochs")
    originals = to_float(common.one_of_each(images, labels))
    pairs = (torch.cat([originals, model(originals)[0]]) + 1) / 2
    common.save_image(run / f"reconstructions_epoch_{epoch:03d}.png",
                      common.tile(pairs, len(originals)),
                      f"{heading}\n{split} images and reconstructions after {epoch} epochs")
    codes = codes.cpu()
    if model.z_dim == 2:
        z = common.prior_grid(20).to(images.device)
        common.save_image(run / "manifold.png",
                          common.tile((model.decoder(z) + 1) / 2, 20, gap=0),
                          f"{heading}\nwhat the decoder makes of the prior's percentiles")
        common.save_scatter(run / "codes.png", codes, labels, f"{heading}\ncodes of "
                            f"{len(codes):,} {split} images; circles: 1, 2, 3 sigma of the prior")
        return
    shown, reach = min(model.z_dim, 20), max(4, codes.abs().max().item())
    rows, columns = math.ceil(shown / 4), min(shown, 4)
    z = torch.linspace(-reach, reach, 200)
    density = torch.exp(-z**2 / 2) / math.sqrt(2 * math.pi)
    title = f"{heading}\ncodes of {len(codes):,} {split} images; line: the prior"
    with common.picture(run / "codes.png", 2.5 * columns + 1, 1.7 * rows + 0.7, title) as figure:
        for i in range(shown):
            axes = figure.add_subplot(rows, columns, i + 1, yticks=[])
            axes.hist(codes[:, i].numpy(), bins=60, range=(-reach, reach), density=True)
            axes.plot(z, density, "k", linewidth=1)
            axes.set_ylim(0, 0.6)  # 1.5 times the prior's peak
            axes.set_title(f"z[{i}]: mean {codes[:, i].mean():.2f}, std {codes[:, i].std():.2f}",
                           fontsize="small")


def draw_curves(rows, run, heading, **levels):
    """The losses by epoch; `levels`, such as test=0.05, are dashed lines in the first picture."""
    common.save_curves(run / "mse.png", f"{heading}\nreconstruction",
                       "mean squared error per pixel", rows,
                       {"train": "train_mse", "val": "val_mse"}, levels)
    if "disc_loss" in rows[0]:
        common.save_curves(
            run / "adversary.png", f"{heading}\nencoder against discriminator",
            "nats; accuracy as a fraction", rows, {
                "generator": "gen_loss", "discriminator": "disc_loss", "accuracy": "disc_accuracy"},
            {"losses of a perfect match": math.log(2), "accuracy of a perfect match": 0.5})


@common.command("aae.py")  # prints a common.UserError without its traceback
def main(argv=None):
    # -- Arguments, device and data -----------------------------------------------------------
    parser = argparse.ArgumentParser(
        prog="aae.py", description="Train an adversarial autoencoder on MNIST.",
        allow_abbrev=False, formatter_class=common.HelpFormatter)
    parser.add_argument("--z-dim", type=common.number(int, 1), default=8, help="latent dimensions")
    parser.add_argument("--posterior", choices=POSTERIORS, default="deterministic",
                        help="what the encoder makes of an image: a code, a Gaussian to draw it "
                        "from, or a code that also depends on noise")
    parser.add_argument("--lam", type=common.number(float, 0, 1), default=0.995,
                        help="weight of the reconstruction; with 1 there is no adversary")
    parser.add_argument("--ae-lr", type=common.number(float, 0), default=3e-3,
                        help="highest learning rate of encoder and decoder")
    parser.add_argument("--d-lr", type=common.number(float, 0), default=5e-4,
                        help="highest learning rate of the discriminator")
    common.add_run_arguments(parser, batch_size=32)
    # With --resume: args are the run's own, except those in may_change; state is its last.pt.
    args, state = common.parse_args(parser, argv, may_change={"epochs", "ae_lr", "d_lr"})

    device, dtype = common.pick_device(args.device, amp=not args.no_amp)
    torch.set_flush_denormal(True)  # a CPU takes many times longer for numbers below 1e-38
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, torch's default for convolutions
    data = common.load_mnist(args.dataset, args.data_dir, args.limit, device)
    args.dataset = data.name  # the one that "auto" chose
    name = f"aae-z{args.z_dim}-lam{args.lam:g}"
    heading = f"AAE on {common.TITLES[data.name]}, z {args.z_dim}, lambda {args.lam:g}"
    if args.posterior != "deterministic":
        name, heading = f"{name}-{args.posterior}", f"{heading}, {args.posterior}"
    if data.name != "mnist":
        name = f"{name}-{data.name}"

    # -- Model and optimizers -----------------------------------------------------------------
    torch.manual_seed(args.seed)
    model = AdversarialAE(args.z_dim, args.posterior)
    model.to(device, memory_format=torch.channels_last)  # the layout convolutions are fastest in
    autoencoder = [*model.encoder.parameters(), *model.decoder.parameters()]
    ae_optimizers = [  # as in vae.py
        common.Muon([p for p in autoencoder if p.dim() > 1], args.ae_lr, weight_decay=0.1),
        torch.optim.AdamW([p for p in autoencoder if p.dim() == 1], args.ae_lr, betas=(0.9, 0.99),
                          fused=True, capturable=True)]  # capturable for common.cuda_graph
    # beta1 0.5 is usual for a discriminator (Radford et al. 2016): its task changes all the time.
    d_optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=args.d_lr,
                                   betas=(0.5, 0.99), fused=True, capturable=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    adversarial = args.lam < 1
    rows = []  # one per epoch

    # -- A new run, or an old one to go on with -----------------------------------------------
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(ae_optimizers, state["ae_optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        d_optimizer.load_state_dict(state["d_optimizer"])
        if state["scaler"]:  # empty after training without float16
            scaler.load_state_dict(state["scaler"])
        rows = state["rows"]
    # The learning rates are tensors, which are filled before each step and read by a CUDA graph.
    # They are set here, as load_state_dict would replace them by copies.
    ae_lr, d_lr = torch.zeros((), device=device), torch.zeros((), device=device)
    for optimizer in ae_optimizers:
        for group in optimizer.param_groups:
            group["lr"] = ae_lr
    d_optimizer.param_groups[0]["lr"] = d_lr
    run = common.open_run(args, state, name, len(rows))
    steps_per_epoch = math.ceil(len(data.train) / args.batch_size)
    print(f"{heading}: {sum(p.numel() for p in model.parameters()):,} parameters on {device} in "
          f"{str(dtype).removeprefix('torch.')}; {len(data.train):,} train, {len(data.val):,} val, "
          f"{len(data.test):,} test images; {args.epochs} epochs of {steps_per_epoch:,} steps, "
          f"{len(rows)} of them done, saved after each; -> {run}", flush=True)
    if not rows:
        val_mse, codes = evaluate(model, data.val)
        print(f"epoch   0/{args.epochs} | untrained    | val {val_mse:.4f} | "
              f"{MOMENTS.format(**code_moments(codes))}", flush=True)
        draw_pictures(model, data.val, data.val_labels, codes, run, heading, epoch=0)

    # -- Training -----------------------------------------------------------------------------
    names = ["train_mse"]  # of what train_step returns
    if adversarial:
        names += ["gen_loss", "disc_loss", "disc_accuracy"]

    def train_step(indices):  # in the form that common.cuda_graph takes
        x = to_float(data.train[indices])  # [B, 1, 28, 28]
        # -- Phase 1, encoder and decoder: reconstruct, and fool the discriminator ------------
        # In the paper these are two steps, between which the discriminator is trained. Here, as in
        # the practical, they are one, and come first, so that the discriminator can learn from the
        # same codes z.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            recon, z = model(x)
            loss, rec, gen = model.autoencoder_loss(x, recon, z, args.lam)
        # Gradients pass through the discriminator, but only `inputs` get a .grad.
        scaler.scale(loss).backward(inputs=autoencoder)
        for optimizer in ae_optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        losses = [rec]

        # -- Phase 2, discriminator: tell these codes from draws of the prior -----------------
        if adversarial:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                disc, accuracy = model.discriminator_loss(z.detach())
            scaler.scale(disc).backward()
            scaler.step(d_optimizer)
            d_optimizer.zero_grad()
            losses += [gen, disc, accuracy]
        scaler.update()
        return torch.stack(losses).detach()

    # A CUDA graph cannot read a number back, as a scaler does.
    if device.type == "cuda" and not scaler.is_enabled():
        train_step = common.cuda_graph(train_step)
    for epoch in range(len(rows) + 1, args.epochs + 1):
        # An epoch's random numbers depend on seed and epoch alone, so a resumed run draws the same
        # as one that was never stopped. (The hash of two integers is the same in every process.)
        torch.manual_seed(hash((args.seed, epoch)))
        began = time.perf_counter()
        sums = 0  # of the losses over the epoch's images
        order = torch.randperm(len(data.train)).to(device)
        bar = tqdm(order.split(args.batch_size), f"epoch {epoch}/{args.epochs}", unit=" img",
                   unit_scale=args.batch_size, disable=None, leave=False)
        for step, indices in enumerate(bar, (epoch - 1) * steps_per_epoch):
            # Both rates rise in the first tenth of the steps, then fall to zero. (If a run is
            # extended, they go up again, to their place in the longer schedule.)
            progress = (step + 0.5) / (args.epochs * steps_per_epoch)
            scale = min(progress / 0.1, (1 - progress) / 0.9)
            ae_lr.fill_(args.ae_lr * scale)
            d_lr.fill_(args.d_lr * scale)
            losses = train_step(indices)
            sums += losses * len(indices)
            if step % 50 == 49:  # not each time: to read a loss is to wait for the device
                bar.set_postfix_str(f"mse {losses[0].item():.4f}")
                if not losses.isfinite().all():  # (weights are checked in save_checkpoint)
                    raise common.UserError(
                        f"a loss is not finite at step {step + 1}: start again with a lower "
                        f"--ae-lr or --d-lr ({run} holds what was saved)")
        means = dict(zip(names, (sums / len(data.train)).tolist(), strict=True))
        train_seconds = time.perf_counter() - began
        val_mse, codes = evaluate(model, data.val)
        seconds = time.perf_counter() - began + (rows[-1]["seconds"] if rows else 0)  # cumulative
        moments = code_moments(codes)
        rows.append({"epoch": epoch, "step": step + 1, "seconds": round(seconds, 2),
                     "images_per_s": round(len(data.train) / train_seconds), **means,
                     "val_mse": val_mse, **moments})
        common.save_checkpoint(run / "last.pt", {
            "model": model.state_dict(),
            "ae_optimizers": [optimizer.state_dict() for optimizer in ae_optimizers],
            "d_optimizer": d_optimizer.state_dict(), "scaler": scaler.state_dict(), "rows": rows,
            "args": vars(args)})
        common.write_json(run / "metrics.jsonl", *rows)
        players = ""
        if adversarial:
            players = (f"gen {means['gen_loss']:.3f} disc {means['disc_loss']:.3f} "
                       f"accuracy {means['disc_accuracy']:.3f} | ")
        print(f"epoch {epoch:3d}/{args.epochs} | train {means['train_mse']:.4f} | "
              f"val {val_mse:.4f} | {players}{MOMENTS.format(**moments)} | "
              f"{rows[-1]['images_per_s'] / 1000:.2f}k img/s | {seconds:.1f} s", flush=True)
        if epoch in (1, 2, 5) or epoch % 10 == 0:
            draw_pictures(model, data.val, data.val_labels, codes, run, heading, epoch)
            draw_curves(rows, run, heading)

    # -- The last model on the test images ----------------------------------------------------
    figures, codes = test_figures(model, data)
    draw_pictures(model, data.test, data.test_labels, codes, run, heading, len(rows), "test")
    draw_curves(rows, run, heading, test=figures["test_mse"])
    common.close_run(args, run, rows, figures | {"epoch": len(rows), "device": str(device)},
                     len(rows))
    print(f"{heading} -> {run}")


if __name__ == "__main__":
    main()
