"""Every test, and the benchmark.

    python test_all.py             all tests, without a network
    python test_all.py -k resume   those with "resume" in their name
    python test_all.py --bench     speed, beside the ordinary way of doing the same work

DATA_DIR names a folder with the real MNIST (MNIST/raw/...), GPT-2's tokenizer (gpt2/vocab.json and
merges.txt) and tinyshakespeare.txt; RANDOM_STRINGS says how many the tokenizer is tried on. Tests
that miss these files, transformers or tiktoken are skipped, and say so.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import unittest
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from tqdm import tqdm

import aae
import common
import gpt
import vae

HERE = Path(__file__).resolve().parent
DATA_DIR = Path(os.environ.get("DATA_DIR", "not given")).absolute()
needs_processes = unittest.skipUnless(hasattr(os, "fork"), "starts processes as POSIX systems do")
render_glyphs = functools.cache(common.render_glyphs)  # tests render them once
PICTURES = [(vae, "save_pictures", vae.save_pictures), (aae, "save_pictures", aae.save_pictures),
            (common, "save_curves", common.save_curves)]
POSTERIORS = ("deterministic", "gaussian", "universal")
SHAPES = ((1, 28), (3, 32), (3, 64), (1, 45), (4, 17), (2, 8))  # channels, image_size


def setUpModule():
    # The tests' models are small: several threads would mostly wait for one another.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def identical(a, b):
    """Fail unless two tensors, or two dicts or lists of tensors, are the same bit for bit."""
    assert_close(a, b, rtol=0, atol=0)


def read_rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def run_script(script, *argv):
    """What `python script.py argv` does -> exit status, stdout, stderr"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.run_script(lambda: script.main([str(word) for word in argv]))
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


class TemporaryFolder(unittest.TestCase):
    """Each test starts in an empty folder of its own. Scripts save no pictures, to save time."""

    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        os.chdir(folder.name)
        self.patch(common, "render_glyphs", render_glyphs)
        for owner, name, _ in PICTURES:
            self.patch(owner, name, lambda *_, **__: None)

    def patch(self, owner, name, value):
        patch = mock.patch.object(owner, name, value)
        patch.start()
        self.addCleanup(patch.stop)

    def succeed(self, script, *argv):
        """-> what the script printed, which ended as it should"""
        status, out, err = run_script(script, *argv)
        self.assertEqual(status, 0, err)
        return out

    def refuse(self, script, *argv, naming):
        """The script ends in one line that names something, and status 2, and changes no file."""
        def files():  # but those with tokens, which the next run can use
            return {path: path.read_bytes() for path in Path().rglob("*")
                    if path.is_file() and not path.match("data/tokens-*.bin")}

        before = files()
        status, out, err = run_script(script, *argv)
        self.assertEqual((status, out), (2, ""), argv)
        self.assertIn(naming, err.splitlines()[-1])
        self.assertNotIn("Traceback", err)
        self.assertEqual(files(), before)


# -- The variational autoencoder --------------------------------------------------------------


class VAE(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.images = vae.to_4_bits(render_glyphs()[0][:1000])
        self.model = vae.VAE(z_dim=20, num_filters=8)

    def test_pixels_become_4_bits_by_the_formula_of_the_practical(self):
        x = torch.arange(256, dtype=torch.uint8)
        formula = (x.double() / 255 * 16).floor().clamp(max=15)
        identical(vae.to_4_bits(x), formula.to(torch.uint8))
        with mock.patch.object(vae, "NUM_VALUES", 256):
            identical(vae.to_4_bits(x), x)

    def test_a_model_whose_weights_are_zero_needs_exactly_4_bits_per_pixel(self):
        for parameter in self.model.parameters():
            nn.init.zeros_(parameter)
        rec, kl = self.model(self.images[:64])
        self.assertEqual(kl.item(), 0)
        self.assertAlmostEqual(vae.elbo_to_bpd(rec, self.images.shape).item(), 4, delta=1e-6)

    def test_kl_divergence_equals_torch_distributions_and_a_monte_carlo_estimate(self):
        mean, log_std = torch.randn(2, 5, 3).double()
        q = torch.distributions.Normal(mean, log_std.exp())
        p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = vae.kl_divergence(mean, log_std)  # summed over the three latents
        assert_close(kl, torch.distributions.kl_divergence(q, p).sum(-1))
        z = q.sample((100_000,))
        estimate = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(0)
        assert_close(kl, estimate, atol=0.03, rtol=0.01)  # the error of 100,000 draws

    def test_reconstruction_loss_is_minus_the_log_probability_of_all_channels(self):
        logits, x = torch.randn(4, 16, 3, 9, 9), torch.randint(16, (4, 3, 9, 9))
        categorical = torch.distributions.Categorical(logits=logits.movedim(1, -1))
        expected = -categorical.log_prob(x).sum((1, 2, 3))
        assert_close(vae.reconstruction_loss(logits, x.to(torch.uint8)), expected)

    def test_the_decoder_gets_posterior_samples_that_pass_gradients_to_the_encoder(self):
        mean = torch.full((5000, 1), 2., requires_grad=True)
        log_std = torch.full((5000, 1), -1., requires_grad=True)
        model, drawn = vae.VAE(z_dim=1, num_filters=4), []
        model.encoder.forward = lambda x: (mean, log_std)
        model.decoder.forward = lambda z: drawn.append(z) or torch.zeros(len(z), 16, 1, 28, 28)
        model(torch.zeros(5000, 1, 28, 28, dtype=torch.uint8))
        z, = drawn
        assert_close(z.mean(), torch.tensor(2.), atol=0.05, rtol=0)
        assert_close(z.std(), torch.tensor(-1.).exp(), atol=0.02, rtol=0)
        z.sum().backward()
        assert_close(mean.grad, torch.ones(5000, 1))
        assert_close(log_std.grad, (z - mean).detach())

    def test_both_estimates_of_log_p_x_equal_the_integral_for_a_one_dimensional_latent(self):
        class Toy(nn.Module):  # 2x2 images whose logits are linear in z, and a rough posterior
            def encoder(self, x):
                return torch.full((len(x), 1), 0.3), torch.full((len(x), 1), -0.2)

            def decoder(self, z):
                return (z * slopes).view(-1, 16, 1, 2, 2)

        slopes, x = torch.randn(64), torch.randint(16, (8, 1, 2, 2))
        z = torch.linspace(-8, 8, 4001).unsqueeze(1)
        log_prior = torch.distributions.Normal(0, 1).log_prob(z.squeeze(1))
        exact = torch.stack([
            (log_prior - vae.reconstruction_loss(Toy().decoder(z), image.expand(4001, 1, 2, 2)))
            .logsumexp(0) + (z[1, 0] - z[0, 0]).log() for image in x])
        for from_prior in (False, True):
            estimate = vae.log_likelihood(Toy(), x, 10_000, from_prior)
            self.assertLess((estimate - exact).abs().max().item(), 0.05, from_prior)

    def test_evaluation_weighs_each_image_the_same_and_gives_the_same_result_again(self):
        images = self.images[:101]  # the last batch has one
        rec, kl = vae.evaluate(lambda x: (x.double().mean(), -x.double().mean()), images)
        self.assertAlmostEqual(rec, images.double().mean().item(), places=9)
        self.assertAlmostEqual(kl, -rec, places=9)
        self.assertEqual(vae.evaluate(self.model, images), vae.evaluate(self.model, images))

    def test_log_std_is_bounded_and_has_a_gradient_at_the_bounds(self):
        encoder = vae.Encoder(z_dim=3)
        nn.init.zeros_(encoder.log_std.weight)
        for bias, expected in ((1, 1), (100, 5), (-100, -5), (15, 5)):
            nn.init.constant_(encoder.log_std.bias, bias)
            log_std = encoder(self.images[:2])[1]
            assert_close(log_std, torch.full_like(log_std, expected), atol=0.03, rtol=0)
        log_std.sum().backward()
        self.assertGreater(encoder.log_std.bias.grad.min().item(), 1e-3)

    def test_any_image_shape_can_be_trained_and_input_of_another_shape_is_refused(self):
        for channels, size in SHAPES:
            model = vae.VAE(5, 4, channels, size)
            x = torch.randint(16, (3, channels, size, size), dtype=torch.uint8)
            sum(model(x)).backward()
            for name, parameter in model.named_parameters():
                self.assertGreater(parameter.grad.abs().sum().item(), 0, name)
            self.assertEqual(model.sample(2).shape, (2, channels, size, size))
            self.assertEqual(vae.mean_image(model.decoder(torch.randn(3, 5))).shape, x.shape)
            for wrong in (x.float(), x[:, 1:], x[..., 1:], x[:, 0]):
                self.assertRaises(AssertionError, model, wrong)

    def test_layers_may_have_no_bias(self):
        class Unbiased(nn.Conv2d):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs, bias=False)

        with mock.patch.object(nn, "Conv2d", Unbiased):
            models = vae.VAE(2, 4), aae.AdversarialAE(2, num_filters=4)
        for model in models:
            self.assertIsNone(model.encoder.net[0].bias)

    def test_samples_follow_the_decoders_categorical_distribution(self):
        model = vae.VAE(z_dim=2, num_filters=4, channels=2)
        for parameter in model.decoder.parameters():
            nn.init.zeros_(parameter)
        logits = torch.randn(16, 2)  # of each channel, the same for every pixel
        model.decoder.net[-2].bias.data = logits.flatten()
        samples = model.sample(200)  # [200, 2, 28, 28]
        for channel in (0, 1):
            x = samples[:, channel].flatten()
            frequency = torch.bincount(x, minlength=16) / len(x)
            assert_close(frequency, logits[:, channel].softmax(0), atol=0.005, rtol=0)

    def test_the_plane_of_latents_shows_the_priors_percentiles_growing_right_and_up(self):
        cdf = torch.distributions.Normal(0, 1).cdf(common.prior_grid(3))
        expected = [[x, y] for y in (5 / 6, 1 / 2, 1 / 6) for x in (1 / 6, 1 / 2, 5 / 6)]
        assert_close(cdf, torch.tensor(expected), atol=1e-5, rtol=0)

    def test_the_plane_is_decoded_in_parts(self):
        sizes, decoder = [], self.model.decoder
        decoder.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        with mock.patch.object(common, "prior_grid", lambda size: torch.zeros(size**2, 20)):
            self.assertEqual(len(vae.visualize_manifold(decoder, 5)), 25)
        self.assertEqual(sizes, [5] * 5)


# -- The adversarial autoencoder --------------------------------------------------------------


class AAE(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.x = aae.to_float(render_glyphs()[0][:64])

    def test_any_image_shape_can_be_trained_and_input_of_another_shape_is_refused(self):
        for (channels, size), posterior in itertools.product(SHAPES, POSTERIORS):
            model = aae.AdversarialAE(5, posterior, 4, channels, size)
            x = torch.rand(3, channels, size, size)
            recon, z = model(x)
            model.autoencoder_loss(x, recon, z, 0.995)[0].backward()
            for name, parameter in model.named_parameters():
                self.assertGreater(parameter.grad.abs().sum().item(), 0, (posterior, name))
            self.assertEqual((recon.shape, z.shape), (x.shape, (3, 5)))
            self.assertEqual(model.sample(2).shape, (2, channels, size, size))
            self.assertLessEqual(model.decoder(100 * z).abs().max().item(), 1)
            for wrong in (x.to(torch.uint8), x[:, 1:], x[..., 1:], x[:, 0]):
                self.assertRaises(AssertionError, model, wrong)

    def test_autoencoder_and_discriminator_losses_equal_their_formulas_for_any_lambda(self):
        model = aae.AdversarialAE()
        recon, z = model(self.x)
        logits = model.discriminator(z)
        for lam in (0, 0.3, 1):
            loss, rec, gen = model.autoencoder_loss(self.x, recon, z, lam)
            assert_close(rec, ((recon - self.x)**2).sum() / (64 * 784))
            assert_close(gen, -logits.sigmoid().log().mean())
            assert_close(loss, lam * rec + (1 - lam) * gen)
        torch.manual_seed(1)
        real = model.discriminator(torch.randn_like(z))
        torch.manual_seed(1)
        disc, _ = model.discriminator_loss(z)
        assert_close(disc, -(real.sigmoid().log() + (1 - logits.sigmoid()).log()).mean() / 2)

    def test_the_discriminators_accuracy_weighs_prior_samples_and_codes_alike(self):
        model = aae.AdversarialAE(z_dim=1)
        for slope, z, expected in ((1, -5., 0.75), (1, 5., 0.25), (0, 5., 0.5)):
            model.discriminator.forward = lambda z, slope=slope: slope * z  # draws: half above 0
            _, accuracy = model.discriminator_loss(torch.full((100_000, 1), z))
            self.assertAlmostEqual(accuracy.item(), expected, delta=0.01)

    @torch.no_grad()
    def test_only_deterministic_codes_repeat_and_gaussian_ones_have_their_mean_and_std(self):
        x = self.x[:1].expand(5_000, -1, -1, -1)
        for posterior in POSTERIORS:
            spread = aae.Encoder(2, posterior)(x[:200]).std(0)
            self.assertEqual((spread > 1e-3).tolist(), [posterior != "deterministic"] * 2)
        encoder = aae.Encoder(2, "gaussian")
        encoder.out.weight.zero_()
        encoder.out.bias.copy_(torch.tensor([1., -2., math.log(0.5), 0.]))  # mean, log std
        z = encoder(x)
        assert_close(z.mean(0), torch.tensor([1., -2]), atol=0.05, rtol=0)
        assert_close(z.std(0), torch.tensor([0.5, 1]), atol=0.02, rtol=0)
        encoder.out.bias.fill_(1e4)
        self.assertTrue(encoder(x[:10]).isfinite().all())

    def test_the_sliced_wasserstein_distance_has_its_closed_form_values(self):
        a, distance = torch.randn(20_000, 1), aae.sliced_wasserstein
        self.assertAlmostEqual(distance(a, a + 0.7, 50), 0.7, places=5)  # a shift
        self.assertAlmostEqual(distance(a, a.flip(0), 50), 0, places=6)  # the same set
        a = torch.randn(2000, 2)
        shifted = distance(a, a + torch.tensor([3., 4]), 10_000)  # 5 times the mean of |cos|
        self.assertAlmostEqual(shifted, 5 * 2 / math.pi, delta=0.05)

    def test_prior_samples_are_at_the_relative_distance_1_and_other_codes_farther(self):
        generator = torch.Generator().manual_seed(3)  # evaluate seeds torch's own

        def model_with(spread):  # codes are draws of N(0, spread^2), images come back as zeros
            return lambda x: (torch.zeros_like(x),
                              spread * torch.randn(len(x), 8, generator=generator))

        images = render_glyphs()[0][:2001]  # the last batch has one
        for spread, low, high in ((1, 0.8, 1.25), (1.2, 3, 20)):
            mse, distance = aae.evaluate(model_with(spread), images)
            self.assertTrue(low < distance < high, (spread, distance))
            self.assertAlmostEqual(mse, (aae.to_float(images)**2).mean().item(), places=5)
        model = aae.AdversarialAE(posterior="gaussian", num_filters=4)
        self.assertEqual(aae.evaluate(model, images), aae.evaluate(model, images))

    def test_another_prior_is_that_of_loss_samples_and_distance(self):
        def prior(n, z_dim, device):  # 7 in each dimension, nearly
            return 7 + 0.01 * torch.randn(n, z_dim, device=device)

        seen, model = [], aae.AdversarialAE(num_filters=4)
        for network in (model.discriminator, model.decoder):
            network.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].mean()))
        with mock.patch.object(aae, "sample_prior", prior):
            model.discriminator_loss(torch.zeros(1000, 8))
            model.sample(1000)
            _, distance = aae.evaluate(lambda x: (x, prior(len(x), 8, "cpu")),
                                       render_glyphs()[0][:1000])
        # The discriminator sees as many codes, here zeros, as draws; the decoder sees draws.
        assert_close(torch.stack(seen), torch.tensor([3.5, 7]), atol=0.01, rtol=0)
        self.assertAlmostEqual(distance, 1, delta=0.25)


# -- What the scripts share -------------------------------------------------------------------


class Common(TemporaryFolder):
    @unittest.skipUnless(hasattr(torch.optim, "Muon"), "this torch has no Muon")
    def test_muon_equals_torch_optim_muon_and_takes_convolution_kernels_as_matrices(self):
        torch.manual_seed(0)
        for shape in ((40, 6, 2, 2), (24, 20, 2, 1)):  # kernels: a tall matrix, and a wide one
            ours = nn.Parameter(torch.randn(shape))
            before = ours.detach().flatten(1).clone()
            theirs = nn.Parameter(before.clone())
            a = common.Muon([ours], lr=0.1, weight_decay=0.1)
            b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1,
                                 adjust_lr_fn="match_rms_adamw")
            for _ in range(3):
                ours.grad = torch.randn_like(ours)
                theirs.grad = ours.grad.flatten(1)
                a.step()
                b.step()
            # Torch's is in bfloat16.
            self.assertLess((ours.flatten(1) - theirs).norm(), 0.01 * (theirs - before).norm())

    def test_muon_keeps_the_contract_of_torchs_optimizers(self):
        weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
        optimizer = common.Muon((weight for weight in weights), lr=0.1, weight_decay=0.1)

        def closure():
            loss = sum((weight**2).sum() for weight in weights[:2])  # none for the third
            loss.backward()
            return loss.detach()

        self.assertEqual(optimizer.step(closure).item(), 12)
        moved = [bool((weight != 1).all()) for weight in weights]
        self.assertEqual((moved, optimizer.step()), ([True, True, False], None))

    @unittest.skipUnless(torch.cuda.is_available(), "no GPU")
    def test_a_step_replayed_from_a_cuda_graph_equals_the_step_run_directly(self):
        def losses(record):
            torch.manual_seed(0)
            weight, lr = torch.randn(5, 5).cuda().requires_grad_(), torch.zeros((), device="cuda")
            optimizer = common.Muon([weight], lr, weight_decay=0.1)

            @record
            def step(x, y):
                loss = (x @ weight + y + torch.randn_like(x)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            for i in range(12):  # two shapes, each recorded at its fourth call
                lr.fill_(0.1 / (i + 1))
                x = torch.full((4 + i % 2, 5), 1.0 + i, device="cuda")
                yield step(x, 2 * x)  # lists keep all of them

        recorded, direct = losses(common.cuda_graph), losses(lambda step: step)
        assert_close(torch.stack([*recorded]), torch.stack([*direct]), rtol=1e-5, atol=0)

    def test_two_runs_never_share_a_folder_even_if_they_start_at_once(self):
        Path("runs/a").mkdir(parents=True)
        for expected in ("a", "a-2", "a-3"):  # no run was in the first
            self.assertEqual(common.new_run_folder("runs/a"), Path("runs", expected))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            self.assertEqual(len(set(pool.map(common.new_run_folder, ["b"] * 20))), 20)
            # All threads have the same process number, like the processes of several containers.
            [*pool.map(common.write_json, ["c.json"] * 20, range(20))]
        self.assertLess(json.loads(Path("c.json").read_text()), 20)

    def test_a_folder_that_cannot_be_made_is_an_error_and_ends_no_loop(self):
        os.symlink("not/mounted", "runs")
        self.assertRaises(FileExistsError, common.new_run_folder, "runs/a")

    def test_paths_may_have_a_tilde_or_a_slash_at_their_end(self):
        with mock.patch.dict(os.environ, HOME=os.getcwd(), USERPROFILE=os.getcwd()):
            args, _ = load("--dataset", "glyphs", "--out-dir", "~/run", "--data-dir", "data/")
        self.assertEqual((args.out_dir, args.data_dir), (str(Path("run").absolute()),
                                                         str(Path("data").absolute())))
        self.assertFalse(load("--dataset", "glyphs", "--out-dir", "")[0].out_dir)

    def test_standard_output_takes_any_text(self):
        with mock.patch.object(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252")) as out:
            common.run_script(lambda: print("фото \udcff", flush=True))
        self.assertEqual(out.buffer.getvalue().decode(), f"фото \\udcff{os.linesep}")

    def test_a_checkpoint_is_written_whole_or_not_at_all(self):
        checkpoint = {"model": {"w": torch.arange(1000.)}, "args": {"script": "vae.py"}}
        common.save_checkpoint(Path("a.pt"), checkpoint)
        before = Path("a.pt").read_bytes()
        with self.assertRaises(KeyError):  # a stop in the middle
            common.save(Path("a.pt"), lambda file: file.write(b"half") and {}["a key"])
        self.assertEqual(Path("a.pt").read_bytes(), before)
        identical(common.load_checkpoint(Path("a.pt"), "vae.py")["model"], checkpoint["model"])

    def test_nan_weights_and_results_that_are_not_finite_are_named_but_masks_may_be_infinite(self):
        model = nn.Linear(1, 1)
        model.register_buffer("mask", torch.tensor([0, -math.inf]))
        common.check_finite(model, {"epoch": 1, "loss": 0.5})
        for bad in (math.nan, math.inf):
            with self.assertRaisesRegex(common.UserError, "^loss is no longer finite"):
                common.check_finite(model, {"epoch": 1, "loss": bad})
        nn.init.constant_(model.bias, math.nan)
        with self.assertRaisesRegex(common.UserError, "^bias is"):
            common.check_finite(model, {"epoch": 1, "loss": math.nan})


# -- Images -----------------------------------------------------------------------------------


def load(*argv):
    """-> args and images, as the image scripts load them"""
    parser = argparse.ArgumentParser(prog="test")
    common.add_image_flags(parser, batch_size=1)
    common.add_run_flags(parser)
    args = parser.parse_args([str(word) for word in argv])
    return args, common.load_images(args, torch.device("cpu"))


def write_pictures(folder, colour=True):
    """40 pictures in two folders: the upper half is light, the lower one darker in some."""
    for i in range(40):
        path = Path(folder, "ab"[i % 2])
        path.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 24, 3), 5 * i, dtype=np.uint8)
        pixels[:10] = (250, 5 * i, 5 * i) if colour else 250
        Image.fromarray(pixels).save(path / f"{i:02d}.png")


class Images(TemporaryFolder):
    def test_glyphs_are_the_same_every_time_and_show_all_digits(self):
        images, labels = render_glyphs()
        self.assertEqual((images.shape, images.dtype), ((70_000, 1, 28, 28), torch.uint8))
        identical((images, labels), render_glyphs.__wrapped__())
        self.assertGreater(torch.bincount(labels).min().item(), 6000)

    def test_the_split_into_train_val_and_test_is_fixed_and_limit_keeps_the_first_of_each(self):
        args, (train, val, test) = load("--dataset", "glyphs", "--seed", 1)
        generator = torch.Generator().manual_seed(42)
        order = torch.randperm(60_000, generator=generator)
        order = torch.cat([order, 60_000 + torch.randperm(10_000, generator=generator)])
        for all_of_them, split in zip(render_glyphs(), zip(train, val, test, strict=True),
                                      strict=True):  # images, then labels
            identical(torch.cat(split), all_of_them[order])
        self.assertEqual((len(val[0]), len(test[0]), args.image_size), (6000, 10_000, 28))
        few = load("--dataset", "glyphs", "--limit", 100)[1]
        for part, whole, n in zip(few, (train, val, test), (100, 10, 10), strict=True):
            identical(part, (whole[0][:n], whole[1][:n]))

    @unittest.skipUnless((DATA_DIR / "MNIST/raw").is_dir(), "DATA_DIR has no MNIST")
    def test_mnist_is_read_and_a_damaged_file_is_named_and_never_replaced_by_glyphs(self):
        args, (_, _, (test, _)) = load("--data-dir", DATA_DIR)
        self.assertEqual((args.dataset, len(test)), ("mnist", 10_000))
        self.assertAlmostEqual(test.double().mean().item(), 33.791, places=3)
        shutil.copytree(DATA_DIR / "MNIST/raw", "data/MNIST/raw")
        path = Path("data/MNIST/raw/t10k-images-idx3-ubyte")
        content = path.read_bytes()
        for damaged in (content[:-1000], b"", b"no image" + content):
            path.write_bytes(damaged)
            with self.assertRaisesRegex(common.UserError, "data/MNIST/raw cannot be read"):
                load()

    def test_offline_glyphs_replace_mnist_only_if_no_dataset_or_folder_was_named(self):
        from torchvision import datasets

        self.patch(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
        with contextlib.redirect_stderr(io.StringIO()) as err:
            args, _ = load("--limit", 10)
        self.assertEqual(args.dataset, "glyphs")
        self.assertRegex(err.getvalue(), "warning: .*MNIST/raw .*[Rr]efused")  # the reason
        for argv in (["--dataset", "mnist"], ["--data-dir", "other"]):
            self.assertRaisesRegex(common.UserError, "MNIST/raw", load, *argv)

    def test_own_pictures_are_read_in_colour_and_labelled_by_their_folders(self):
        write_pictures("photos")
        args, (train, val, test) = load("--dataset", "photos", "--image-size", 16)
        for (images, labels), number in zip((train, val, test), (32, 4, 4), strict=True):
            self.assertEqual(images.shape, (number, 3, 16, 16))
            # 5 * i in the lower half; odd i lie in the second folder.
            identical(images[:, 2, -1, 0] // 5 % 2, labels.to(torch.uint8))
        self.assertTrue((train[0][:, 0, 0] == 250).all())
        self.assertEqual(args.image_size, 16)
        write_pictures("grey", colour=False)
        self.assertEqual(load("--dataset", "grey")[1][0][0].shape[1:], (1, 32, 32))

    def test_linked_folders_are_read_once_broken_links_named_and_hidden_names_left_out(self):
        write_pictures("elsewhere")
        Path("photos").mkdir()
        os.symlink("../elsewhere/a", "photos/a")
        os.symlink("../photos", "photos/loop")
        os.symlink("../nowhere", "photos/broken.png")
        for name in (".ipynb_checkpoints/1.png", ".DS_Store", "._1.png", "b/.hidden.png"):
            Path("photos", name).parent.mkdir(exist_ok=True)
            shutil.copy("elsewhere/b/01.png", Path("photos", name))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            images, labels, _ = common.read_pictures("photos", 8)
        self.assertEqual((len(images), labels.unique().tolist()), (20, [0]))
        self.assertRegex(err.getvalue(), "^warning: photos/broken.png is left out .*\n$")

    def test_palette_alpha_16_bit_and_rotated_pictures_look_as_in_a_viewer(self):
        pixels = np.zeros((40, 40, 3), dtype=np.uint8)
        pixels[:20] = 200  # light above, dark below
        picture, turned = Image.fromarray(pixels), Image.Exif()
        turned[0x0112] = 6  # "turn it by 90 degrees", as a phone writes it
        Path("a").mkdir()
        for name in ("1.png", "2.jpg", "3.JPEG", "4.webp", "5.gif", "6.bmp"):
            picture.save(f"a/{name}")
        picture.rotate(90).save("a/7.jpg", exif=turned)
        picture.convert("P").save("a/8.png")
        picture.convert("RGBA").save("a/9.png")
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save("a/10.png")  # 16 bits
        for mode in ("LA", "RGBA"):  # black; above white shines through to 200 of 255
            icon = Image.new(mode, (40, 40))
            icon.putalpha(Image.fromarray(255 - pixels[..., 0]))
            icon.save(f"a/11{mode}.png")
        Path("a/broken.png").write_bytes(b"broken")
        for kind in (np.int32, np.float32):
            Image.fromarray(pixels[..., 0].astype(kind)).save(f"a/{kind.__name__}.tif")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            images, _, _ = common.read_pictures("a", 8)
        self.assertRegex(err.getvalue(), r"(?s)broken.png.*float32.tif.*mode F.*int32.tif.*mode I ")
        expected = torch.tensor([200.] * 4 + [0] * 4).view(1, 1, 8, 1).expand(12, 1, 8, 8)
        away = torch.tensor([0, 1, 2, 5, 6, 7])  # from the edge, which JPEG blurs
        assert_close(images.float()[:, :, away], expected[:, :, away], atol=8, rtol=0)


# -- GPT: the model ---------------------------------------------------------------------------

TOKENS = torch.randint(61, (5, 24), generator=torch.Generator().manual_seed(0))


def edited(name, before, after, **more):
    """-> what somebody gets who replaces a text in the class or function `name` of gpt.py"""
    source = inspect.getsource(getattr(gpt, name))
    assert source.count(before) == 1, before
    names = vars(gpt) | more
    exec(source.replace(before, after), names)
    return names[name]


def small_gpt(**changes):
    """A GPT in float64 whose attention is far from uniform, like a trained one's"""
    config = dict(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32) | changes
    model = gpt.GPT(gpt.GPTConfig(**config)).double()
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


class GPTModel(unittest.TestCase):
    def test_attention_is_causal_and_the_loss_is_the_cross_entropy_of_the_targets(self):
        for fused in (True, False):
            model, targets = small_gpt(fused=fused), TOKENS.roll(-1, 1)
            logits, loss = model(TOKENS, targets)
            changed = torch.cat([TOKENS[:, :12], targets[:, 12:]], 1)
            same = (model(changed)[0] - logits).abs().amax((0, 2)) < 1e-9  # [T]
            self.assertEqual(same.tolist(), [True] * 12 + [False] * 12)
            of_targets = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))
            assert_close(loss, -of_targets.mean())

    def test_fused_and_plain_attention_have_equal_values_and_gradients(self):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64).requires_grad_()
        some = torch.rand(5, 9) < torch.tensor([1] + [0.5] * 8)  # each sees the first at least
        for query, mask in ((q, None), (q[:, :, :5], some)):
            results = []
            for fused in (True, False):
                y = gpt.attention(query, k, v, mask, fused=fused)
                results.append([y, *torch.autograd.grad(y.square().sum(), [query, k, v])])
            assert_close(*results, rtol=1e-9, atol=1e-12)

    def test_dropout_is_for_training_only(self):
        expected = small_gpt()(TOKENS)[0]
        for fused in (True, False):
            model = small_gpt(dropout=0.2, fused=fused)
            assert_close(model(TOKENS)[0], expected)
            self.assertGreater((model.train()(TOKENS)[0] - expected).abs().mean().item(), 0.1)
            self.assertRaises(AssertionError, model.generate, TOKENS, 1)  # only in evaluation mode
            y = gpt.attention(*torch.ones(3, 100, 1, 30, 8), dropout_p=0.5, fused=fused)
            self.assertTrue(0.95 < y.mean() < 1.05 and y.std() > 0.1)

    def test_a_new_model_has_the_uniform_loss_and_gpt2s_initial_weights(self):
        torch.manual_seed(0)
        model = gpt.GPT(gpt.GPTConfig(1000, 64, n_layer=8, n_head=4, n_embd=128))
        idx = torch.randint(1000, (4, 64))
        self.assertAlmostEqual(model(idx, idx.roll(1, 1))[1].item(), math.log(1000), delta=0.1)
        for name, w in model.named_parameters():
            if w.dim() == 2:
                std = 0.01 if name == "wpe.weight" else 0.02
                std /= 4 if name.endswith("c_proj.weight") else 1  # sqrt(2 * n_layer)
                self.assertAlmostEqual(w.std().item() / std, 1, delta=0.05, msg=name)
            else:
                self.assertTrue((w == (1 if name.endswith("weight") else 0)).all(), name)


class Generation(unittest.TestCase):
    def test_text_with_the_cache_or_a_recorded_step_equals_that_without_past_the_block(self):
        def record(step):  # overwrites its tensors at each call, like common.cuda_graph
            inputs, results = {}, {}

            def replay(*tensors):
                shape = tensors[0].shape
                for kept, new in zip(inputs.setdefault(shape, [x.clone() for x in tensors]),
                                     tensors, strict=True):
                    kept.copy_(new)
                result = step(*inputs[shape])
                return results.setdefault(shape, result.clone()).copy_(result)
            return replay

        def rubbish(*size, **options):  # in places of the cache that are not used yet
            return torch.full(size, 100.0, **options)

        for fused, B, T, sampling in (
                (True, 5, 1, {}), (True, 1, 7, {"temperature": 1.5}), (True, 5, 24, {"top_k": 5}),
                (True, 5, 40, {"top_p": 0.9}), (False, 5, 7, {"do_sample": False})):
            model, prompt = small_gpt(fused=fused), TOKENS.repeat(1, 2)[:B, :T]
            expected = prompt
            torch.manual_seed(1)
            for _ in range(45):  # a pass over the whole window for each token
                logits = model(expected[:, -24:])[0][:, -1].detach()
                expected = torch.cat([expected, gpt.next_token(logits, **sampling)], dim=1)
            for zeros, how in ((torch.zeros, None), (torch.zeros, record), (rubbish, None)):
                torch.manual_seed(1)
                with mock.patch.object(torch, "zeros", zeros):
                    identical(model.generate(prompt, 45, record=how, **sampling), expected)

    def test_a_change_of_q_and_k_where_they_are_split_is_cached_too(self):
        def turn(x, positions):  # rotary positions, one frequency for all pairs
            angle, (left, right) = 0.3 * positions[:, None], x.chunk(2, dim=-1)
            return torch.cat([left * angle.cos() - right * angle.sin(),
                              left * angle.sin() + right * angle.cos()], dim=-1)

        rotary = edited("CausalSelfAttention", "q, k, v = qkv\n", "q, k, v = qkv\n"
                        "        q, k = turn(q, positions), F.normalize(turn(k, positions))\n",
                        turn=turn)
        with mock.patch.object(gpt, "CausalSelfAttention", rotary):
            for model in (small_gpt(), small_gpt(fused=False)):
                expected = TOKENS[:, :7]
                for _ in range(30):  # past the block
                    token = model(expected[:, -24:])[0][:, -1].argmax(-1, keepdim=True)
                    expected = torch.cat([expected, token], dim=1)
                identical(model.generate(TOKENS[:, :7], 30, do_sample=False), expected)

    def test_generation_under_autocast_writes_what_a_pass_under_autocast_says(self):
        for fused, dtype in itertools.product((True, False), (torch.bfloat16, torch.float16)):
            model = small_gpt(fused=fused).float()
            with torch.no_grad(), torch.autocast("cpu", dtype):
                text = model.generate(TOKENS[:, :7], 17, do_sample=False)
                best = model(text[:, :-1])[0][:, 6:].argmax(-1)
            self.assertGreater((text[:, 7:] == best).float().mean(), 0.9)  # but for rounding

    def test_sampling_follows_the_softmax_or_is_greedy_and_top_k_and_top_p_truncate_it(self):
        p, two, greedy = [0.09, 0.5, 0.41], [0, 0.5, 0.41], [0, 1, 0]
        for probs, sampling, expected in (  # up to a factor
                (p, {}, p), (p, {"temperature": 2}, [0.3, 0.707, 0.64]),  # square roots
                (p, {"temperature": 0.5}, [0.0081, 0.25, 0.1681]), (p, {"temperature": 0}, greedy),
                (p, {"temperature": 1e-40}, greedy), (p, {"do_sample": False}, greedy),
                (p, {"top_k": 1}, greedy), (p, {"top_k": 2}, two), (p, {"top_p": 0}, greedy),
                (p, {"top_p": 0.4}, greedy), (p, {"top_p": 0.51}, two), (p, {"top_p": 0.9}, two),
                (p, {"top_p": 0.92}, p), ([0.5, 0.25, 0.25], {"top_p": 0.5}, [1, 0, 0]),
                (p, {"top_k": 2, "top_p": 0.54}, greedy),  # of two 0.5 has a share of 0.55
                ([0.25] * 4, {"top_k": 0}, [1] * 4), ([0.25] * 4, {"top_k": 10**6}, [1] * 4)):
            torch.manual_seed(0)
            tokens = gpt.next_token(torch.tensor(probs).log().expand(20_000, -1), **sampling)
            shares = torch.bincount(tokens.flatten(), minlength=len(probs)) / 20_000
            expected = torch.tensor(expected) / sum(expected)
            assert_close(shares, expected, atol=0.02, rtol=0, msg=f"{sampling}")
            self.assertEqual(shares.count_nonzero(), expected.count_nonzero(), sampling)
        for sampling in ({"top_k": 3}, {"top_p": 0.75}):  # three of four equal ones
            tokens = gpt.next_token(torch.zeros(2000, 4), **sampling)
            self.assertEqual(len(tokens.unique()), 3)


# -- GPT: tokenizers --------------------------------------------------------------------------


def import_transformers(test):
    """-> the module, or skip the test"""
    try:
        import transformers
        from transformers import GPT2LMHeadModel  # noqa: F401 - not there with an older torch
    except ImportError:
        test.skipTest("transformers is not installed, or too new for this torch")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def byte_tokenizer(*merges, special=()):
    """A vocabulary of bytes, as GPT-2 writes them (Ġ: a space, Ċ: a line end), merges and more"""
    visible = {*range(33, 127), *range(161, 256)} - {173}
    hidden = [byte for byte in range(256) if byte not in visible]
    tokens = [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]
    tokens += [*(merge.replace(" ", "") for merge in merges), *special]
    vocab = {token: id for id, token in enumerate(tokens)}
    return gpt.BPETokenizer(vocab, [merge.split(" ") for merge in merges],
                            {text: vocab[text] for text in special})


class Tokenizers(TemporaryFolder):
    def test_byte_pairs_merge_by_rank_and_from_left_to_right(self):
        tokenizer = byte_tokenizer("b c", "a a", "a b", "aa a", "Ġ a", "bc bc")
        for text, expected in (("abc", "a bc"), ("ab", "ab"), ("aaaaa", "aa aaa"), ("aab", "aa b"),
                               ("bcbcbc", "bcbc bc"), (" a ab", "Ġa Ġ ab"), ("a" * 7, "aa aa aaa"),
                               ("", ""), ("bb", "b b")):
            ids = tokenizer.encode(text)
            self.assertEqual([list(tokenizer.vocab)[id] for id in ids], expected.split(), text)
            self.assertEqual(tokenizer.decode(ids), text)

    def test_special_tokens_become_one_id_and_the_longest_match_wins(self):
        plain = byte_tokenizer()
        self.assertEqual((plain.end_of_text, plain.start, len(plain)), (None, 10, 256))
        tokenizer = byte_tokenizer(special=("<|endoftext|>", "<|user|>", "<|user|>!", "user"))
        self.assertEqual((tokenizer.end_of_text, tokenizer.start, len(tokenizer)), (256, 256, 260))
        text, ids = " <|user|><|user|>!<|user<|endoftext|>", [32, 257, 258, *b"<|", 259, 256]
        self.assertEqual((tokenizer.encode(text), tokenizer.decode(ids)), (ids, text))

    def test_decoding_waits_for_whole_characters_and_takes_any_ids(self):
        for ids, parts in ((b"n\n", "n|\n|"), ("é".encode(), "|é|"), ("😀".encode(), "|||😀|"),
                           ([0xff, 10**9], "\ufffd|\ufffd|"), ([0xc3, 0x28], "|\ufffd(|"),
                           ([0xc3], "|\ufffd")):  # the last part comes after all ids
            self.assertEqual("|".join(byte_tokenizer().stream(ids)), parts)

    @unittest.skipUnless(find_spec("tiktoken"), "tiktoken is not installed")
    @unittest.skipUnless((DATA_DIR / "gpt2").is_dir(), "DATA_DIR has no GPT-2 tokenizer")
    def test_random_strings_and_tiny_shakespeare_have_the_ids_of_tiktoken(self):
        import tiktoken.load

        folder, generator = DATA_DIR / "gpt2", random.Random(0)
        with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=""):
            ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
                f"{folder}/merges.txt", f"{folder}/vocab.json")
        theirs = tiktoken.Encoding(
            "gpt2", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}, pat_str=
            r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        ours = gpt.load_tokenizer(folder)
        assigned = [c for c in map(chr, range(sys.maxunicode + 1))
                    if unicodedata.category(c) not in ("Cn", "Cs")]
        hard = [*" \t\n\r\f\x1c\x85\xa0\u2028'sdmtlrevSL01½²Ⅷ_aé\u0301\u200d日", "<|endoftext|>"]
        texts = [path.read_text(encoding="utf-8") for path in DATA_DIR.glob("tinyshakespeare.txt")]
        for _ in range(int(os.environ.get("RANDOM_STRINGS", 5_000))):
            pool = generator.choice([assigned, assigned[:3000], assigned[:128], hard])
            texts.append("".join(generator.choices(pool, k=generator.randrange(40))))
        for text in texts:
            ids = ours.encode(text)
            self.assertEqual(ids, theirs.encode(text, allowed_special="all"))
            self.assertEqual(ours.decode(ids), text)

    def test_blocks_of_a_text_have_the_tokens_of_the_whole_text_and_limit_cuts_it(self):
        tokenizer = byte_tokenizer("Ġ Ġ", "Ċ Ċ", "č Ċ", "Ċ Ġ", "a b", "Ġ a", special=["<|"])
        for white in (" ", "\n", "\r\n", "\n\n\n", "  \x1c\n", "\x1c", "\u3000\x85\n", ""):
            parts = ["abab", "a", "1", "!", "é😀", "'s", "<|", " ", white, white, white]
            text = "".join(random.Random(0).choices(parts, k=400))
            Path("text").write_text(text, encoding="utf-8", newline="")
            for size in (1, 7, 50):
                blocks = list(gpt.read_blocks("text", limit=None, size=size))
                tokens = [id for block in blocks for id in tokenizer.encode(block)]
                self.assertEqual(tokens, tokenizer.encode(text), (white, size))
                self.assertGreater(sum(map(bool, blocks)), 5)  # not all in one block
            self.assertEqual("".join(gpt.read_blocks("text", limit=77, size=10)), text[:77])

    def test_the_character_tokenizer_has_an_id_for_each_character_and_decodes_them(self):
        tokenizer = gpt.CharTokenizer("\n abcé")
        tokenizer.save(".")
        again = gpt.load_tokenizer(".")
        self.assertEqual((len(again), again.start, again.characters), (6, 0, "\n abcé"))
        self.assertEqual(again.encode("cab\n"), [4, 2, 3, 0])
        self.assertEqual(list(again.stream([4, 2, 0, 99])), ["c", "a", "\n", "\ufffd"])
        self.assertRaisesRegex(ValueError, "dx", again.encode, "axbxd")

    def test_tokenizer_json_comes_before_other_files_and_unknown_settings_are_refused(self):
        byte_tokenizer().save(".")  # three files that are not read
        token, own = {"id": 258, "content": "<|a b|>"}, byte_tokenizer("a b", "ab c")
        model = {"type": "BPE", "vocab": own.vocab, "merges": own.merges}
        whole = {"added_tokens": [token], "model": model, "pre_tokenizer": {"type": "ByteLevel"}}
        for merges in (own.merges, ["a b", "ab c"]):  # both are in use
            common.write_json("tokenizer.json", whole | {"model": model | {"merges": merges}})
            self.assertEqual(gpt.load_tokenizer(".").encode("abc<|a b|>"), [257, 258])
        for part, change in (
                ("normalizer", {"type": "NFC"}), ("pre_tokenizer", None),
                ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
                ("post_processor", {"type": "BertProcessing"}), ("model", {"type": "Unigram"}),
                ("model", model | {"byte_fallback": True}),
                ("added_tokens", [token | {"lstrip": True}])):
            common.write_json("tokenizer.json", whole | {part: change})
            self.assertRaisesRegex(common.UserError, part[:5], gpt.load_tokenizer, ".")


# -- GPT: a folder in the hub's layout --------------------------------------------------------


def write_folder(folder, tokenizer, **changes):
    """small_gpt() and its tokenizer, in a folder as on the hub"""
    Path(folder).mkdir(parents=True)
    gpt.save_model(small_gpt(**changes), folder)
    tokenizer.save(folder)


def write_tensors(path, tensors):
    """A .safetensors file of float32 and bool tensors"""
    header, data = {}, b""
    for name, tensor in tensors.items():
        new = tensor.numpy().tobytes()
        header[name] = {"dtype": {4: "F32", 1: "BOOL"}[tensor.element_size()],
                        "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(new)]}
        data += new
    header = json.dumps(header).encode()
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + data)


class Pretrained(TemporaryFolder):
    def setUp(self):
        super().setUp()
        write_folder("m", byte_tokenizer("a b"))

    def test_weights_load_from_one_file_or_shards_under_all_key_names(self):
        named = dict(gpt.read_tensors(Path("m/model.safetensors")))
        bare = {name.removeprefix("transformer."): w.clone() for name, w in named.items()}
        more = {"h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool),
                "h.1.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": bare["wte.weight"]}
        only_head = {name: w for name, w in (bare | more).items() if name != "wte.weight"}
        os.remove("m/model.safetensors")
        for saved in (named, bare, bare | more, only_head):
            # In shards, which an index names, and then whole, which comes before an index
            for files in (["1.safetensors", "2.safetensors"], ["model.safetensors"]):
                index = {name: files[i % len(files)] for i, name in enumerate(saved)}
                common.write_json("m/model.safetensors.index.json", {"weight_map": index})
                for file in files:
                    write_tensors(f"m/{file}", {n: w for n, w in saved.items() if index[n] == file})
                identical(gpt.GPT.from_pretrained("m").state_dict(),
                          small_gpt().float().state_dict())
            os.remove("m/model.safetensors")

    @torch.no_grad()
    def test_an_output_layer_of_its_own_is_kept_and_refused_by_a_class_without_it(self):
        class Untied(gpt.GPT):
            def __init__(self, config):
                super().__init__(config)
                self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

            def logits(self, x):
                return self.lm_head(x)

        with mock.patch.object(gpt, "GPT", Untied):
            saved = small_gpt().float()
        gpt.save_model(saved, "m")
        identical(Untied.from_pretrained("m").state_dict(), saved.state_dict())
        self.refuse(gpt, "generate", "--model", "m", naming="lm_head.weight")
        theirs = import_transformers(self).GPT2LMHeadModel.from_pretrained("m").eval()
        assert_close(theirs(TOKENS).logits, saved(TOKENS)[0], rtol=1e-3, atol=1e-4)

    def test_weights_that_are_missing_cut_short_or_of_another_kind_are_named(self):
        path = Path("m/model.safetensors")
        content = path.read_bytes()
        for size in (0, 5, 8, 300, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            self.refuse(gpt, "generate", "--model", "m", naming="model.safetensors is incomplete")
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171")
        self.refuse(gpt, "generate", "--model", "m", naming="git lfs pull")
        path.rename("m/pytorch_model.bin")
        self.refuse(gpt, "generate", "--model", "m", naming="save_pretrained")

    def test_saving_and_loading_keep_all_weights_and_a_subclass_loads_as_itself(self):
        Own = type("Own", (gpt.GPT,), {})
        saved = small_gpt(fused=False, dropout=0.1, eos_token_id=[3, 7], bos_token_id=5).float()
        gpt.save_model(saved, "m")
        model = Own.from_pretrained("m")
        self.assertEqual((type(model), model.training, model.config), (Own, False, saved.config))
        identical(model.state_dict(), saved.state_dict())

    def test_other_architectures_are_refused_by_name(self):
        config = json.loads(Path("m/config.json").read_text())
        for name, value, naming in (
                ("model_type", "gpt_neo", "model_type"), ("activation_function", "relu", "relu"),
                ("layer_norm_epsilon", 1e-6, "epsilon"),
                ("n_layer", 4, "h.3.ln_1.bias"), ("n_layer", 2, "h.2.ln_1.bias")):
            common.write_json("m/config.json", config | {name: value})
            self.refuse(gpt, "generate", "--model", "m", naming=naming)

    def test_a_pickle_that_runs_code_is_not_run(self):
        Harm = type("Harm", (), {"__reduce__": lambda self: (open, ("harm", "w"))})
        torch.save({"model": {}, "args": {"script": "vae.py"}, "x": Harm()}, "last.pt")
        self.refuse(vae, "--resume", ".", naming="last.pt")  # and makes no file

    @torch.no_grad()
    def test_six_models_of_transformers_give_the_same_logits_and_return_bit_identical(self):
        transformers = import_transformers(self)
        for V, T, n_layer, n_head, n_embd in (
                (97, 16, 1, 1, 8), (1000, 33, 2, 3, 48), (503, 128, 5, 2, 64), (61, 24, 3, 4, 32),
                (2048, 64, 4, 8, 128), (3, 5, 1, 2, 2)):
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=V, n_positions=T, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                initializer_range=0.2)).bfloat16()
            theirs.save_pretrained(f"{V}", max_shard_size="100KB")
            ours, idx = gpt.GPT.from_pretrained(f"{V}"), torch.randint(V, (2, T))
            theirs.eval().float()
            assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-3, atol=1e-4)
            gpt.save_model(ours, "m")
            back = transformers.GPT2LMHeadModel.from_pretrained("m")
            identical(back.state_dict(), theirs.state_dict())

    def test_a_download_cut_short_leaves_no_file_and_a_whole_one_is_not_repeated(self):
        asked, weights = [], "model.safetensors"

        class Hub(http.server.SimpleHTTPRequestHandler):
            def send_head(self):
                asked.append(Path(self.path).name)
                return super().send_head()

            def copyfile(self, source, output):  # cut short if weights are asked for at first
                output.write(source.read()[:-50 if asked.count(weights) == 1 else None])

        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Hub, directory="hub"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.patch(os, "environ", os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "no_proxy": "127.0.0.1"})
        self.patch(torch.hub, "get_dir", lambda: "cache")
        self.patch(sys, "stderr", io.StringIO())  # where it says what is downloaded
        shutil.copytree("m", "hub/openai-community/gpt2/resolve/main")

        self.assertEqual(gpt.load_tokenizer("gpt2").encode("ab"), [256])
        self.assertNotIn(weights, asked)
        self.assertRaises(ConnectionError, gpt.GPT.from_pretrained, "gpt2")
        loaded = gpt.GPT.from_pretrained("gpt2").state_dict()
        identical(loaded, small_gpt().float().state_dict())
        asked.clear()
        gpt.GPT.from_pretrained("gpt2")
        self.assertEqual((len(gpt.load_tokenizer("gpt2")), asked), (257, []))
        self.assertRaisesRegex(OSError, "me/none", gpt.GPT.from_pretrained, "me/none")  # a 404


# -- GPT: its two commands ---------------------------------------------------------------------


class GenerateCommand(TemporaryFolder):
    def setUp(self):
        super().setUp()
        letters = gpt.CharTokenizer("\n abcdefghijklmnopqrstuvwxyz")
        write_folder("letters", letters, vocab_size=28)
        write_folder("bytes", byte_tokenizer(special=("<|endoftext|>",)), vocab_size=257)

    def write(self, *argv, model="letters"):
        """-> the texts that `generate` prints"""
        return self.succeed(gpt, "generate", "--model", model, "--device", "cpu", *argv)

    def test_wrong_values_are_answered_in_one_line(self):
        for argv in ("--top-k -1", "--top-p 1.1", "--temperature nan", "--num-samples 0",
                     "--max-new-tokens 0", "--max-new 3", "--seed -1", "--prompt no:token"):
            flag, value = argv.split()
            self.refuse(gpt, "generate", "--model", "letters", flag, value, naming=flag)

    def test_other_samples_and_seeds_give_other_texts_and_equal_seeds_equal_ones(self):
        for flags in (["--model", "letters"], ["--model", "bytes"], ["--half"]):
            first, again, other = (self.write(*flags, "--prompt", "one", "--num-samples", 3,
                                              "--seed", seed) for seed in (1, 1, 2))
            self.assertEqual(first, again)
            texts = f"{first}---\n{other}".split("\n---\n")
            self.assertEqual((len(set(texts)), {text[:3] for text in texts}), (6, {"one"}))

    def test_a_prompt_longer_than_the_block_is_cut_to_its_last_tokens_with_a_warning(self):
        status, out, err = run_script(gpt, "generate", "--model", "letters", "--greedy",
                                      "--prompt", "beginning " + "long " * 20)
        self.assertEqual((status, out[:20]), (0, "beginning long long "))
        self.assertRegex(err, "24 .* 110")
        self.assertEqual(out[10:], self.write("--temperature", 0, "--prompt", "long " * 20))

    def test_generation_stops_at_any_end_token_in_the_models_config(self):
        for ends, text in ((256, "xabc\n"), ([256, 99], "xab\n"), (None, "xabc<|endoftext|>d\n")):
            gpt.save_model(small_gpt(vocab_size=257, eos_token_id=ends), "bytes")
            tokens = torch.tensor([97, 98, 99, 256, 100]).view(5, 1, 1).expand(5, 2, 1)
            with mock.patch.object(gpt, "next_token", side_effect=list(tokens)):
                out = self.write("--prompt", "\ufeffx", "--max-new-tokens", 5, "--num-samples", 2,
                                 model="bytes")
            self.assertEqual(out, f"{text}---\n{text}")

    def test_a_text_without_a_prompt_starts_with_the_models_token_or_a_line_end(self):
        letters = "\n abcdefghijklmnopqrstuvwxyz"
        for config, generation, start in ((5, {}, 5), (None, {}, 0), (99, {}, 0), (-1, {}, 0),
                                          (5, {"bos_token_id": 7}, 7)):
            gpt.save_model(small_gpt(vocab_size=28, bos_token_id=config), "letters")
            common.write_json("letters/generation_config.json", generation)
            self.assertEqual(self.write("--greedy"),
                             self.write("--greedy", "--prompt", letters[start])[1:])


GPT_RUN = ("train --text text.txt --n-layer 2 --n-embd 32 --block-size 16 --eval-every 15 "
           "--device cpu")


def write_text(path):
    """-> a text of 5,000 characters, which come in threes, so a model learns them in a few steps"""
    text = "".join(random.Random(0).choices(["abc", " de", "fg\n", "gab"], k=1667))[:5000]
    Path(path).write_text(text, newline="")
    return text


class Training(TemporaryFolder):
    def setUp(self):
        super().setUp()
        self.text = write_text("text.txt")

    def test_a_tokenized_text_is_kept_in_a_file_for_each_text_and_tokenizer(self):
        letters, runs = gpt.CharTokenizer("\n abcdefg"), Path("runs")
        tokenizers = letters, byte_tokenizer("a b"), byte_tokenizer(special=["c d"])
        for i, (tokenizer, limit) in enumerate(itertools.product(tokenizers, (None, 3333)), 1):
            tokens = gpt.tokenize("text.txt", limit, tokenizer, runs)
            self.assertEqual(tokens.tolist(), tokenizer.encode(self.text[:limit]))
            self.assertEqual(len(os.listdir(runs)), i)
        with mock.patch.object(letters, "encode", side_effect=AssertionError):
            _, _, err = run_script(mock.Mock(main=lambda _: gpt.tokenize(
                "text.txt", None, letters, runs)))
        self.assertRegex(err, r"^runs.tokens-\w+\.bin: used again")
        Path("text.txt").write_text("a" * (2**20 - 2) + "c d")  # a special token is not cut
        tokens = gpt.tokenize("text.txt", None, tokenizers[2], runs)
        self.assertEqual(tokens[-2:].tolist(), [97, 256])

    def test_training_without_a_download_reads_pythons_documentation_and_says_why(self):
        errors = gpt.urllib.error
        for error, reason in ((errors.URLError("Tunnel connection failed: 407"), "407"),
                              (errors.HTTPError("url", 429, "Too Many Requests", {}, None), "429"),
                              (TimeoutError("timed out"), "timed out")):
            with mock.patch("urllib.request.urlopen", side_effect=error):
                status, out, err = run_script(gpt, "train", "--limit", 5000, "--max-steps", 1)
            self.assertEqual((status, Path("runs/gpt-python-topics/last.pt").exists()), (0, True))
            self.assertRegex(err, f"warning: .*{reason}.*Python's documentation")

    def test_only_out_dir_and_data_dir_are_written_and_the_tokenizer_only_once(self):
        os.mkdir("w")
        self.succeed(gpt, *GPT_RUN.split(), "--max-steps", 15, "--out-dir", "w/a", "--data-dir",
                     "w/data")
        self.assertEqual(sorted(os.listdir()), ["text.txt", "w"])
        with mock.patch.object(gpt.CharTokenizer, "save", side_effect=AssertionError):
            self.succeed(gpt, "train", "--resume", "w/a", "--max-steps", 30)

    def test_a_run_with_compile_can_go_on_without(self):
        with mock.patch.object(torch, "compile", lambda model, **_: model):
            self.succeed(gpt, *GPT_RUN.split(), "--max-steps", 15, "--out-dir", "a", "--compile")
        with mock.patch.object(torch, "compile", side_effect=RuntimeError):
            self.succeed(gpt, "train", "--resume", "a", "--max-steps", 30, "--no-compile")
        self.assertEqual([row["step"] for row in read_rows("a")], [15, 30])

    def test_a_run_that_is_saved_between_evaluations_goes_on_from_there(self):
        save = inspect.getsource(gpt.train).split("        common.save_checkpoint(")[1]
        save = save[:save.index('"rows": rows})')]
        train = edited("train", "  # so a checkpoint that you save here is resumed here\n", "\n"
                       f"            if done == 20:\n                common.save_checkpoint({save}"
                       '"rows": rows})\n                stop()\n',
                       stop=mock.Mock(side_effect=[None, KeyboardInterrupt]))
        self.patch(gpt, "train", train)
        argv = [*GPT_RUN.split(), "--max-steps", 30, "--out-dir"]
        self.succeed(gpt, *argv, "whole")
        self.assertEqual(run_script(gpt, *argv, "stopped")[0], 130)
        out = self.succeed(gpt, "train", "--resume", "stopped")
        self.assertIn("20 of 30 steps done", out)
        whole, stopped = (torch.load(f"{run}/last.pt") for run in ("whole", "stopped"))
        identical(whole["model"], stopped["model"])
        self.assertEqual([r["val_loss"] for r in whole["rows"]],
                         [r["val_loss"] for r in stopped["rows"]])

    def test_what_is_frozen_stays_frozen_in_a_new_a_tuned_and_a_resumed_run(self):
        here = "    # All three ways to a model meet here."
        self.patch(gpt, "train", edited("train", here, "    model.h[0].requires_grad_(False)\n"
                                        f"    model.wte.requires_grad_(False)\n{here}"))
        tune = "train --text text.txt --init muon --device cpu"
        for run, flags, optimizer in (("muon", GPT_RUN, "muon"), ("adamw", GPT_RUN, "adamw"),
                                      ("tuned", tune, "muon")):
            self.succeed(gpt, *flags.split(), "--optimizer", optimizer, "--out-dir", run,
                         "--max-steps", 1)
            first = torch.load(f"{run}/last.pt")["model"]
            self.succeed(gpt, "train", "--resume", run, "--max-steps", 5)
            for name, weight in torch.load(f"{run}/last.pt")["model"].items():
                frozen = name.startswith(("h.0.", "wte."))
                self.assertEqual(torch.equal(weight, first[name]), frozen, name)

    def test_training_windows_cover_the_text_and_differ_between_steps_and_seeds(self):
        seen, windows = [], gpt.windows
        self.patch(gpt, "windows", lambda tokens, starts, length: seen.append(
            (len(tokens), *starts)) or windows(tokens, starts, length))
        for seed in (1, 1, 2):
            self.succeed(gpt, *GPT_RUN.split(), "--max-steps", 70, "--seed", seed)
        seen = [starts for length, *starts in seen if length == 4500]  # those to train on
        self.assertEqual(seen[:70], seen[70:140])
        self.assertEqual(len(set(map(tuple, seen))), 140)
        covered = np.unique(np.ravel(seen[:70])[:, None] + np.arange(16))
        # 70 steps x 8 windows x 16 tokens are two passes; at random they would see 1 - e^-2 = 0.86.
        self.assertGreater(len(covered), 0.99 * 4500)

    def test_a_run_loads_in_transformers_and_their_tokenizer_loads_here(self):
        transformers = import_transformers(self)
        Path("bytes").mkdir()
        byte_tokenizer("a b", "Ġ ab", special=("<|endoftext|>", "<|user|>")).save("bytes")
        for tokenizer in ("char", "bytes"):
            run = f"runs/gpt-{tokenizer}"
            self.succeed(gpt, *GPT_RUN.split(), "--max-steps", 15, "--tokenizer", tokenizer,
                         "--out-dir", run)
            theirs = transformers.GPT2LMHeadModel.from_pretrained(run).eval()
            ours, idx = gpt.GPT.from_pretrained(run), TOKENS[:, :16] % 9
            assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
        tokenizer = transformers.GPT2Tokenizer.from_pretrained(run)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.save_pretrained("theirs")
        text = "ab ab'll <|user|>  abc<|endoftext|>\n\n日本é"
        for name in (run, "theirs"):
            self.assertEqual(gpt.load_tokenizer(name).encode(text), tokenizer.encode(text))

    def test_losses_of_ten_steps_equal_those_of_transformers_with_torchs_adamw(self):
        transformers = import_transformers(self)
        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())  # back to this
        torch.set_default_dtype(torch.float64)
        seen, original = [], gpt.GPT.forward

        def note(model, idx, targets):
            logits, loss = original(model, idx, targets)
            seen.extend([(idx, targets, loss.item())] if model.training else [])
            return logits, loss

        self.patch(gpt.GPT, "forward", note)
        write_folder("old", gpt.CharTokenizer("\n abcdefg"))
        self.succeed(gpt, *"train --text text.txt --init old --device cpu --out-dir new".split(),
                     "--optimizer", "adamw", "--max-steps", 11, "--lr", 1e-3)
        theirs = transformers.GPT2LMHeadModel.from_pretrained("old").double()
        groups = [{"params": [p for p in theirs.parameters() if p.dim() == dim],
                   "weight_decay": decay} for dim, decay in ((2, 0.1), (1, 0.0))]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        self.assertEqual(len(seen), 11)  # the last shows what ten steps did
        for step, (idx, targets, ours) in enumerate(seen):
            identical(targets[:, :-1], idx[:, 1:])  # the next tokens
            loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
            self.assertAlmostEqual(ours, loss.item(), delta=1e-8)
            for group in optimizer.param_groups:  # in 11 steps the rate only falls
                group["lr"] = 1e-3 * (1 - (step + 0.5) / 11) / (1 - 0.01)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()

    def test_fine_tuning_keeps_tokenizer_and_size_and_starts_at_the_pretrained_loss(self):
        write_folder("hub", byte_tokenizer(), vocab_size=300, eos_token_id=[9, 8], bos_token_id=7)
        model, tokenizer = gpt.GPT.from_pretrained("hub"), gpt.load_tokenizer("hub")
        ids = torch.tensor(tokenizer.encode(self.text)).split([4500, 500])[1]  # to validate
        before = model(ids[:480].view(20, 24), ids[1:481].view(20, 24))[1].item()  # whole windows
        argv = "train --text text.txt --init hub --device cpu --batch-size 3".split()
        self.succeed(gpt, *argv, "--max-steps", 1, "--lr", 0, "--out-dir", "same")
        self.assertAlmostEqual(read_rows("same")[0]["val_loss"], before, places=5)
        self.succeed(gpt, *argv, "--max-steps", 50, "--lr", 3e-3, "--out-dir", "a")
        losses = [row["val_loss"] for row in read_rows("a")]
        self.assertLess(losses[-1], before - 0.1)
        self.assertEqual(gpt.load_tokenizer("a").vocab, tokenizer.vocab)
        self.assertEqual(gpt.GPT.from_pretrained("a").config, model.config)
        for flags in ("--n-layer 3", "--n-head 4", "--n-embd 32", "--tokenizer char"):
            self.refuse(gpt, *argv, *flags.split(), naming="--init")


# -- Runs of the scripts ----------------------------------------------------------------------

# A short run of each script: 15 steps in an epoch, or between two evaluations
IMAGES = "--dataset glyphs --limit 300 --batch-size 20 --num-filters 4 --device cpu"
SHORT = {vae: IMAGES, aae: IMAGES, gpt: GPT_RUN}
RATES = {vae: ["--lr"], aae: ["--ae-lr", "--d-lr"], gpt: ["--lr"]}


def length_flags(script, epochs):
    """-> the flag for a run's length and its value"""
    return ["--max-steps", 15 * epochs] if script is gpt else ["--epochs", epochs]


def short_argv(script, epochs, *more):
    return [*SHORT[script].split(), *length_flags(script, epochs), *more]


def with_rate(script, rate):
    return [word for flag in RATES[script] for word in (flag, rate)]


def resume_argv(script, run, *more):
    return [*(["train"] if script is gpt else []), "--resume", run, *more]


def assert_the_same_run(first, second, error=0.0):
    """All tensors of the checkpoints, and all results but times, are the same."""
    contents = []
    for run in (first, second):
        saved = {path.name: torch.load(path) for path in sorted(Path(run).glob("*.pt"))}
        rows = [*saved["last.pt"]["rows"], *read_rows(run)]
        rows += [json.loads(path.read_text()) for path in Path(run).glob("test.json")]
        for row in rows:
            row.update(seconds=0, images_per_s=0, tokens_per_s=0)
        contents.append([rows, *([checkpoint.get(name) or {} for checkpoint in saved.values()]
                                 for name in ("model", "optimizers", "scaler"))])
    assert_close(*contents, rtol=error, atol=error)


def run_and_die(script, argv, instant):
    """What a process does: run a script in this folder, and kill itself at the instant-th of its
    backward passes and writes, which does not depend on how busy the machine is."""
    left = instant

    def dangerous(function):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper

    tqdm.set_lock(threading.RLock())  # its own lock would leak in a process that is killed
    torch.Tensor.backward = dangerous(torch.Tensor.backward)
    os.fsync, os.replace = dangerous(os.fsync), dangerous(os.replace)
    common.render_glyphs = lambda: torch.load("glyphs.pt")
    for owner, name, _ in PICTURES:
        setattr(owner, name, lambda *_, **__: None)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sys.modules[script].main([str(word) for word in argv])


def start_process(function, *arguments):
    """-> a process that runs function(*arguments)"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])  # or each process would import it
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


class Runs(TemporaryFolder):
    def setUp(self):
        super().setUp()
        write_text("text.txt")

    def test_a_run_leaves_its_files_and_pictures(self):
        for owner, name, save in PICTURES:
            self.patch(owner, name, save)
        samples = "samples_epoch_000.png samples_epoch_001.png samples_epoch_002.png"
        rebuilt = samples.replace("samples", "reconstructions")
        for script, flags, name, own in (
                (vae, "--z-dim 2", "vae-z2-glyphs", f"test.json best.pt bpd.png {samples} "
                 "reconstructions.png latents.png manifold.png"),
                (vae, "", "vae-z20-glyphs", f"test.json best.pt bpd.png {samples} "
                 "reconstructions.png"),
                (aae, "--z-dim 2 --lam 1", "aae-z2-lam1-glyphs", f"test.json manifold.png mse.png "
                 f"codes.png adversary.png {samples} {rebuilt}"),
                (aae, "--posterior universal", "aae-z8-lam0.995-universal-glyphs", "test.json "
                 f"codes.png mse.png adversary.png {samples} {rebuilt}"),
                (gpt, "", "gpt-text", "config.json model.safetensors vocab.json loss.png")):
            out = self.succeed(script, *short_argv(script, 2, *flags.split()))
            self.assertRegex(out.splitlines()[-1], f"^{name}.* -> runs/{name}$")
            opening = out.splitlines()[:3]
            self.assertIn(f"--resume runs/{name}", opening[-1])
            self.assertLessEqual(max(map(len, opening)), 80)
            self.assertEqual(sorted(os.listdir(f"runs/{name}")), sorted(
                f"args.json metrics.jsonl last.pt {own}".split()))

    @needs_processes
    def test_a_run_killed_while_it_is_extended_ends_bit_identical_to_an_unbroken_one(self):
        torch.save(render_glyphs(), "glyphs.pt")
        for script in SHORT:
            name, more = script.__name__, ["--dropout", 0.2] * (script is gpt)
            for run in (f"{name}-whole", f"{name}-killed"):
                self.succeed(script, *short_argv(script, 2, *more, "--out-dir", run))
            longer = [*length_flags(script, 5), *with_rate(script, 1e-3)]
            extend = resume_argv(script, f"{name}-killed", *longer)
            self.succeed(script, *resume_argv(script, f"{name}-whole", *longer))
            # Counted are backward passes, and two calls for each file that is written.
            passes = 30 if script is aae else 15  # in an epoch
            for instant, where in ((2, "first writes"), (12, "a step"), (passes + 7, "last writes"),
                                   (passes + 17, "the next epoch"), (9, "a step")):
                process = start_process(run_and_die, name, extend, instant)
                process.join()
                self.assertEqual(process.exitcode, -signal.SIGKILL, where)
            self.succeed(script, *extend)
            assert_the_same_run(f"{name}-whole", f"{name}-killed")
        identical(*(gpt.GPT.from_pretrained(f"gpt-{run}").state_dict() for run in (
            "whole", "killed")))

    def test_losses_in_16_and_32_bits_are_near_and_ctrl_c_and_resume_change_nothing(self):
        def save_and_stop(path, checkpoint, save=common.save_checkpoint):
            save(path, checkpoint)
            if path.name == "last.pt" and len(checkpoint["rows"]) == 1:
                raise KeyboardInterrupt

        for script, column, *dtypes in (
                (vae, "train_bpd", torch.bfloat16), (aae, "train_mse", torch.bfloat16),
                (gpt, "train_loss", torch.bfloat16, torch.float16)):
            losses = {}
            for dtype in (torch.float32, *dtypes):
                device = torch.device("cpu"), dtype
                self.patch(common, "pick_device", lambda *_, device=device, **__: device)
                whole, stopped = (f"{script.__name__}-{dtype}{end}" for end in ("", "-stopped"))
                self.succeed(script, *short_argv(script, 3, "--out-dir", whole))
                with mock.patch.object(common, "save_checkpoint", save_and_stop):
                    status, _, _ = run_script(script, *short_argv(script, 3, "--out-dir", stopped))
                self.assertEqual(status, 130)
                self.succeed(script, *resume_argv(script, stopped))
                assert_the_same_run(whole, stopped)
                losses[dtype] = read_rows(whole)[-1][column]
                self.assertAlmostEqual(losses[dtype] / losses[torch.float32], 1, delta=0.03)
        self.assertTrue(torch.load(f"{whole}/last.pt")["scaler"])  # of float16

    def test_resuming_a_run_with_arguments_that_contradict_it_is_refused(self):
        Path("half").mkdir()
        for script in SHORT:
            self.succeed(script, *short_argv(script, 1, "--out-dir", script.__name__))
        for script, other, size in ((vae, "gpt", "--z-dim"), (aae, "vae", "--z-dim"),
                                    (gpt, "aae", "--n-layer")):
            content = Path(script.__name__, "last.pt").read_bytes()
            Path("half/last.pt").write_bytes(content[:1000])
            for run in ("nowhere", "half"):
                self.refuse(script, *resume_argv(script, run), naming=f"{run}/last.pt")
            for flag, value in (("--seed", 1), (size, 3), ("--batch-size", 10), ("--limit", 100),
                                ("--out-dir", "b")):
                argv = resume_argv(script, script.__name__, *length_flags(script, 2), flag, value)
                self.refuse(script, *argv, naming=flag)
            self.refuse(script, *resume_argv(script, other), naming=f"{other}.py")

    def test_resuming_a_run_with_changed_data_is_refused(self):
        self.succeed(gpt, *short_argv(gpt, 1, "--out-dir", "gpt"))
        Path("text.txt").write_text("abc" * 999)
        write_pictures("photos")
        argv = short_argv(vae, 1, "--dataset", "photos", "--out-dir", "vae")
        self.succeed(vae, *argv)
        argv = resume_argv(vae, "vae", *length_flags(vae, 2))
        for source, target in (("a/00.png", "a/new.png"), ("a/02.png", "b/02.png"),
                               ("a/04.png", "a/44.png")):  # one more, moved, renamed
            shutil.copytree("photos", "changed")
            shutil.move(f"changed/{source}", f"changed/{target}")
            if target == "a/new.png":
                shutil.copy("photos/a/00.png", "changed/a")
            self.refuse(vae, *argv, "--dataset", "changed", naming="changed")
            shutil.rmtree("changed")
        self.refuse(vae, *argv, "--dataset", "glyphs", naming="--dataset glyphs")
        shutil.move("photos", "elsewhere")
        self.refuse(vae, *argv, naming="photos")
        self.succeed(vae, *argv, "--dataset", "elsewhere")
        status, _, err = run_script(gpt, *resume_argv(gpt, "gpt", *length_flags(gpt, 2)))
        self.assertEqual(status, 2)
        self.assertIn("text.txt", err.splitlines()[-1])

    def test_a_run_goes_on_behind_its_last_checkpoint_even_if_fewer_epochs_have_a_row(self):
        for script in (vae, aae):
            self.succeed(script, *short_argv(script, 2, "--out-dir", script.__name__))
            path = f"{script.__name__}/last.pt"
            checkpoint = torch.load(path)
            del checkpoint["rows"][1]
            torch.save(checkpoint, path)
            self.succeed(script, *resume_argv(script, script.__name__, *length_flags(script, 3)))
            self.assertEqual([row["epoch"] for row in read_rows(script.__name__)], [1, 3])

    def test_wrong_values_are_answered_in_one_line(self):
        Path("a_file").touch()
        Path("empty").mkdir()
        of_images = ["--epochs 0", "--z-dim 0", "--z-dim two", "--image-size 4", "--dataset empty",
                     "--dataset imagenet", "--dataset glyphs --image-size 32",
                     "--dataset mnist --data-dir a_file"]
        own = {vae: of_images, aae: [*of_images, "--lam 1.01", "--lam nan", "--posterior normal"],
               gpt: ["--max-steps 0", "--dropout 2", "--n-embd 30", "--grad-accum 3",
                     "--optimizer sgd", "--text nowhere"]}
        named = {"--out-dir": "a_file", "--data-dir": "a_file", "--image-size": "image",
                 "--text": "nowhere"}  # instead of the flag
        for script, rates in RATES.items():
            for argv in ("--seed -1", f"--seed {10**30}", "--limit 0", "--batch-size 0", "--data 2",
                         *(f"{rate} {value}" for rate in rates for value in ("-1", "nan", "inf")),
                         "--out-dir a_file/run", *own[script],
                         *["--device cuda"] * (not torch.cuda.is_available())):
                flag = argv.split()[-2]
                self.refuse(script, *SHORT[script].split(), *argv.split(),
                            naming=named.get(flag, flag))

    def test_a_run_that_diverges_stops_before_its_weights_are_saved(self):
        for script, losses in ((vae, (1., math.inf)), (aae, (math.inf, 1.)), (gpt, math.inf)):
            argv = short_argv(script, 1, "--out-dir", "a")
            ends = [run_script(script, *argv, *with_rate(script, 1e9))]
            with mock.patch.object(script, "evaluate", return_value=losses):  # of finite weights
                ends.append(run_script(script, *argv))
            for status, _, err in ends:
                self.assertEqual((status, "Traceback" in err), (2, False))
                self.assertIn("lower learning rate", err.splitlines()[-1])
        files = {path.name for path in Path().glob("a*/*")}
        self.assertEqual(files, {"args.json", "vocab.json"})

    def test_each_epoch_has_other_random_numbers(self):
        for script, column in ((vae, "train_rec"), (aae, "disc_loss")):
            argv = short_argv(script, 2, "--out-dir", script.__name__)
            self.succeed(script, *argv, *with_rate(script, 0))  # so that weights stay
            first, second = (row[column] for row in read_rows(script.__name__))
            self.assertNotEqual(first, second)

    def test_own_colour_pictures_are_learned(self):
        write_pictures("photos")
        pixels = common.read_pictures(os.path.abspath("photos"), 16)[0] / 127.5
        # The mean image's error. And the bits of each pixel by itself: of three colours above and
        # three below one is constant, the others have 200 / 16 values.
        for script, column, simple in ((aae, "val_mse", pixels.var(0).mean().item()),
                                       (vae, "val_bpd", 5 / 6 * math.log2(200 / 16))):
            self.succeed(script, *short_argv(script, 100, "--dataset", "photos", "--image-size", 16,
                                        "--num-filters", 16, "--batch-size", 8, "--z-dim", 4))
            run, = Path("runs").glob(f"{script.__name__}-*-photos")
            self.assertLess(read_rows(run)[-1][column], 0.5 * simple)

    def test_vae_tests_and_gpt_saves_the_model_with_the_best_validation_loss(self):
        losses = iter([[3, 3], [1, 1], [2, 2], [5, 5], [6, 6]])  # three epochs; tests
        with mock.patch.object(vae, "evaluate", lambda *_: next(losses)):
            self.succeed(vae, *short_argv(vae, 3, "--out-dir", "vae"))
        self.assertEqual(json.loads(Path("vae/test.json").read_text())["epoch"], 2)
        for losses in ([1.0, 2.0], [2.0, 1.0]):
            with mock.patch.object(gpt, "evaluate", side_effect=losses):
                self.succeed(gpt, *short_argv(gpt, 2, "--out-dir", f"{losses[0]}"))
        first, last = (gpt.GPT.from_pretrained(run).state_dict() for run in ("1.0", "2.0"))
        identical(last, torch.load("2.0/last.pt")["model"])
        self.assertTrue((first["wte.weight"] != last["wte.weight"]).any())

    def test_codes_match_the_prior_for_lambda_below_1_but_not_for_lambda_1(self):
        for lam, low, high in ((0.995, 0, 3), (1, 4, 1000)):
            self.succeed(aae, *short_argv(aae, 6, "--limit", 2000, "--ae-lr", 1e-2, "--d-lr", 1e-3,
                                     "--num-filters", 8, "--lam", lam, "--out-dir", f"lam{lam}"))
            row = read_rows(f"lam{lam}")[-1]
            self.assertLess(row["val_mse"], 0.18)  # 0.22: the mean of all images
            self.assertTrue(low < row["val_distance"] < high, row)

    def test_each_phase_of_an_aae_step_updates_only_its_own_networks(self):
        torch.manual_seed(42)
        first = aae.AdversarialAE(num_filters=4).state_dict()
        for i, (flags, expected) in enumerate((
                ("", {"encoder", "decoder", "discriminator"}),
                ("--d-lr 0", {"encoder", "decoder"}), ("--ae-lr 0", {"discriminator"}))):
            self.succeed(aae, *short_argv(aae, 1, *flags.split(), "--out-dir", f"{i}"))
            last = torch.load(f"{i}/last.pt")["model"]
            moved = {name.split(".")[0] for name in first
                     if (first[name] - last[name]).abs().max() > 1e-20}
            self.assertEqual(moved, expected, flags)


def train_apart(argv, environment, instant):
    """What a process of torchrun does: train in float64, and kill itself at an instant"""
    os.environ |= environment
    torch.set_default_dtype(torch.float64)
    if instant:
        sys.stderr = io.StringIO()  # if one is killed the other fails, with a long message
    run_and_die("gpt", argv, instant)


@needs_processes
class TwoProcesses(TemporaryFolder):
    def train(self, *argv, processes, instant=0):
        """-> the exit codes of gpt.py's processes; each is killed at this instant, if not 0"""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        started = [start_process(train_apart, argv, {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, instant) for rank in range(processes)]
        for process in started:
            process.join()
        return [process.exitcode for process in started]

    def test_two_processes_train_the_same_model_as_one_and_one_can_resume_their_run(self):
        write_text("text.txt")
        torch.save(render_glyphs(), "glyphs.pt")
        argv = short_argv(gpt, 3, "--batch-size", 8, "--out-dir")
        for run, n in (("one", 1), ("two", 2)):  # each of the two takes its share in two parts
            self.assertEqual(self.train(*argv, run, "--grad-accum", n, processes=n), [0] * n)
        killed = self.train(*argv, "killed", processes=2, instant=40)  # in the second part
        self.assertIn(-signal.SIGKILL, killed)
        self.assertEqual(self.train("train", "--resume", "killed", processes=1), [0])
        assert_the_same_run("one", "two", error=1e-9)
        assert_the_same_run("one", "killed", error=1e-9)


# -- A copy that somebody changes, and README -------------------------------------------------


class CopiedCode(TemporaryFolder):
    def test_each_model_runs_if_pasted_into_a_file_that_imports_only_torch(self):
        def paste(file):  # -> what it defines, if only torch and the standard library are imported
            source, names = (HERE / file).read_text(encoding="utf-8"), {"__name__": "pasted"}
            others = r"(?m)^(import common|import numpy as np|from tqdm import tqdm)$"
            exec(re.sub(others, "", source), names)
            return names

        vae_parts, aae_parts, gpt_parts = paste("vae.py"), paste("aae.py"), paste("gpt.py")
        x = render_glyphs()[0][:2]
        model = vae_parts["VAE"](2, 4)
        sum(model(x >> 4)).backward()
        self.assertEqual(model.sample(2).shape, x.shape)
        self.assertEqual(vae_parts["log_likelihood"](model, x >> 4, 3).shape, (2,))
        paste("common.py")["Muon"]([model.decoder.net[0].weight], 0.1, 0.0).step()

        model = aae_parts["AdversarialAE"](2, "universal")
        recon, z = model(x / 255)
        model.autoencoder_loss(x / 255, recon, z, 0.995)[0].backward()
        model.discriminator_loss(z.detach())[0].backward()
        self.assertEqual(aae_parts["sliced_wasserstein"](z, z, 10), 0)

        model = gpt_parts["GPT"](gpt_parts["GPTConfig"](61, 24, 2, 2, 16, fused=False))
        model(TOKENS, TOKENS)[1].backward()
        self.assertEqual(model.eval().generate(TOKENS, 3, top_p=0.9).shape, (5, 27))
        own = byte_tokenizer("a b")
        pasted = gpt_parts["BPETokenizer"](own.vocab, own.merges, own.special)
        self.assertEqual(pasted.encode("ab é"), own.encode("ab é"))
        self.assertEqual(gpt_parts["CharTokenizer"]("abc").encode("cab"), [2, 0, 1])

    def test_an_added_parameter_gets_one_optimizer_and_evaluation_has_no_dropout(self):
        class Changed:  # goes before the script's class
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.own = nn.ParameterList(map(torch.ones, ((), (2, 2), (1, 2, 2))))
                self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
                self.unused = nn.Parameter(torch.ones(2, 2))

            def forward(self, *inputs):
                self.modes.add((self.training, torch.is_grad_enabled()))
                factor = math.prod(weight.mean() for weight in [*self.own, self.frozen])
                return [factor * result for result in super().forward(*inputs)]

        write_text("text.txt")
        for script, name, flags in ((vae, "VAE", ""), (aae, "AdversarialAE", ""),
                                    (vae, "VAE", "--optimizer adam"),
                                    (aae, "AdversarialAE", "--optimizer adam"),
                                    (gpt, "GPT", "--optimizer muon"),
                                    (gpt, "GPT", "--optimizer adamw")):
            changed = type(name, (Changed, getattr(script, name)), {"modes": set()})
            for run, rates in ((f"{name}{flags}-still", with_rate(script, 0)),
                               (f"{name}{flags}-moved", [])):
                with mock.patch.object(script, name, changed):
                    argv = short_argv(script, 1, "--out-dir", run)
                    self.succeed(script, *argv, *flags.split(), *rates)
            still, moved = (torch.load(f"{name}{flags}-{run}/last.pt") for run in (
                "still", "moved"))
            for weight, before in still["model"].items():
                self.assertEqual(bool((moved["model"][weight] != before).any()),
                                 weight not in ("frozen", "unused"), weight)
            groups = [group for o in moved["optimizers"] for group in o["param_groups"]]
            self.assertEqual(sum(len(group["params"]) for group in groups), len(moved["model"]))
            self.assertEqual(changed.modes, {(True, True), (False, False)})

    def test_a_renamed_discriminator_and_a_second_one_are_trained_by_phase_2_alone(self):
        source = (HERE / "aae.py").read_text(encoding="utf-8")
        for old, new in (
                ("self.discriminator = Discriminator(z_dim)",
                 "self.discriminator, self.second = Discriminator(z_dim), Discriminator(z_dim)"),
                ("[*model.discriminator.parameters()]",
                 "[*model.discriminator.parameters(), *model.second.parameters()]"),
                ("self.discriminator(z)", "(self.discriminator(z) + self.second(z))"),
                ("self.discriminator(both)", "(self.discriminator(both) + self.second(both))")):
            self.assertIn(old, source)
            source = source.replace(old, new)
        copy = {"__name__": "copy"}
        exec(re.sub(r"\.discriminator\b", ".critic", source), copy)
        first = {}
        for run, rates in (("still", "--ae-lr 0 --d-lr 0"), ("phase1", "--d-lr 0"),
                           ("phase2", "--ae-lr 0")):
            with contextlib.redirect_stdout(io.StringIO()):
                copy["save_pictures"] = copy["common"].save_curves = lambda *_, **__: None
                copy["main"]([*IMAGES.split(), "--epochs", "1", "--out-dir", run, *rates.split()])
            weights = torch.load(f"{run}/last.pt")["model"]
            moved = {name.split(".")[0] for name in first if (weights[name] != first[name]).any()}
            first = first or weights
            self.assertEqual(moved, {"still": set(), "phase1": {"encoder", "decoder"},
                                     "phase2": {"critic", "second"}}[run])


class Readme(TemporaryFolder):
    TEXT = (HERE / "README.md").read_text(encoding="utf-8")

    def test_every_flag_in_the_readme_is_in_the_help(self):
        commands = re.findall(r"(vae|aae|gpt)\.py((?:\\\n|[^\n`|&])*)", self.TEXT)
        self.assertGreater(len(commands), 3)
        for name, rest in commands:
            script = {"vae": vae, "aae": aae, "gpt": gpt}[name]
            command = rest.split()[:1] if script is gpt else []
            flags = set(re.findall(r"--[a-z-]+", rest))
            if flags:
                self.assertLessEqual(flags, set(run_script(script, *command, "--help")[1].split()))

    def test_the_python_examples_of_the_readme_run(self):
        blocks = re.findall(r"```python\n(.*?)```", self.TEXT, re.S)
        self.assertGreater(len(blocks), 1)
        for z_dim in (2, 20):
            argv = short_argv(vae, 1, "--z-dim", z_dim, "--out-dir", f"runs/vae-z{z_dim}")
            self.succeed(vae, *argv)
        # In the place of the one on the hub:
        write_folder("gpt2", byte_tokenizer(special=["<|endoftext|>"]), vocab_size=257)
        for block in blocks:
            exec(block.replace("60", "3"), {})  # fewer frames

    def test_the_pictures_of_the_readme_exist_and_are_small(self):
        pictures = re.findall(r"figures/[\w.-]+", self.TEXT)
        self.assertEqual(set(pictures), {f"figures/{path.name}" for path in HERE.glob("figures/*")})
        for picture in pictures:
            self.assertLess((HERE / picture).stat().st_size, 300_000, picture)

    def test_the_line_counts_in_the_readmes_map_are_right(self):
        for name, lines in re.findall(r"\| `(\w+\.py)` \| (\d+) \|", self.TEXT):
            source = (HERE / name).read_text(encoding="utf-8")
            self.assertEqual(len(source.splitlines()), int(lines), name)


# -- The benchmark ----------------------------------------------------------------------------


def in_turn(title, ours, theirs, runs=5):
    """Call two functions in turn, which return a speed each. Print medians and their ratio."""
    pairs = [(ours(), theirs()) for _ in range(runs)]
    a, b = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
    ratios = sorted(x / y for x, y in pairs)
    print(f"{title}: {a:,.1f} beside {b:,.1f}; ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def per_second(number, work):
    start = time.perf_counter()
    work()
    return number / (time.perf_counter() - start)


def script_speed(column, *argv):
    """What a script itself reports of its first epoch or its training"""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *map(str, argv), "--device", "cpu", "--out-dir",
                        f"{folder}/run"], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        return read_rows(f"{folder}/run")[-1][column]


def ordinary_images(script, data_dir, number):
    """The networks of vae.py or aae.py trained as most tutorials do it: a DataLoader with a
    transform, Adam, and the loss read at each step. -> images/s"""
    from torchvision import datasets, transforms

    model = vae.VAE() if script == "vae.py" else aae.AdversarialAE()
    data = datasets.MNIST(data_dir, train=True, transform=transforms.ToTensor())
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(number)), 64,
                                         shuffle=True)
    networks = nn.ModuleList([model.encoder, model.decoder])
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3)
    if script == "aae.py":
        d_optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=1e-4)

    def epoch():
        for x, _ in loader:
            if script == "vae.py":
                loss = sum(model((x * 16).clamp(max=15).long()))
            else:
                recon, z = model(2 * x - 1)
                loss = model.autoencoder_loss(2 * x - 1, recon, z, lam=0.995)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if script == "aae.py":
                d_optimizer.zero_grad()
                model.discriminator_loss(z.detach())[0].backward()
                d_optimizer.step()
            loss.item()

    return per_second(number, epoch)


def transformers_training(text, steps):
    """transformers' model in the size of `gpt.py train`, trained by torch. -> tokens/s"""
    import transformers

    tokenizer = gpt.CharTokenizer("".join(sorted(set(text))))
    tokens = torch.tensor(tokenizer.encode(text))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_layer=4, n_head=4, n_embd=128,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def train():
        for _ in range(steps):
            x = tokens[torch.randint(len(tokens) - 64, (8, 1)) + torch.arange(64)]
            model(input_ids=x, labels=x).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return per_second(steps * 8 * 64, train)


def bench(data_dir):
    import transformers

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of runs in turn, "
          "and the ratio with its range", flush=True)
    for script in ("vae.py", "aae.py"):
        in_turn(f"training, images/s: {script} beside a DataLoader and Adam",
                lambda script=script: script_speed(
                    "images_per_s", script, "--data-dir", data_dir, "--limit", 6400, "--epochs", 1),
                lambda script=script: ordinary_images(script, data_dir, 6400))
    transformers.logging.set_verbosity_error()
    text = Path(data_dir, "tinyshakespeare.txt")
    few = text.read_text(encoding="utf-8")[:100_000]
    in_turn("training, tokens/s: gpt.py (AdamW) beside transformers", lambda: script_speed(
        "tokens_per_s", "gpt.py", "train", "--text", text, "--limit", 100_000, "--max-steps", 100,
        "--optimizer", "adamw"), lambda: transformers_training(few, 100))
    ours = gpt.GPT(gpt.GPTConfig(50257, 1024, 12, 12, 768)).eval()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    idx = torch.randint(50257, (1, 32))
    in_turn("generation with GPT-2's 124M, tokens/s: gpt.py beside transformers",
            lambda: per_second(200, lambda: ours.generate(idx, 200, do_sample=False)),
            lambda: per_second(200, lambda: theirs.generate(
                idx, attention_mask=torch.ones_like(idx), min_new_tokens=200, max_new_tokens=200,
                do_sample=False, pad_token_id=0)))


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


class Runner(unittest.TextTestRunner):
    resultclass = Result


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bench"]:
        bench(*(sys.argv[2:] or [os.environ.get("DATA_DIR", "data")]))
        sys.exit()
    result = unittest.main(exit=False, verbosity=2, testRunner=Runner).result
    failed = len(result.failures) + len(result.errors)
    for test, reason in result.skipped:
        print(f"skipped {test}: {reason}")
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
    sys.exit(bool(failed))
