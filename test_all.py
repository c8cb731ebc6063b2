"""Every test, and the benchmark.

    python test_all.py             all tests, without a network
    python test_all.py -k resume   those with "resume" in their name
    python test_all.py --bench     speed, beside the ordinary way of doing the same work

DATA_DIR names a folder with the real MNIST (MNIST/raw/...) and GPT-2's tokenizer (gpt2/vocab.json
and merges.txt, and its weights if they are at hand). Tests that miss these, transformers or
tiktoken are skipped, and say so.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import http.server
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
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from tqdm import tqdm

import aae
import common
import gpt
import vae

HERE = Path(__file__).resolve().parent
DATA_DIR = Path(os.environ.get("DATA_DIR", "not given")).absolute()  # as each test has a folder
GPT2_FILES = [DATA_DIR / "gpt2" / name for name in ("vocab.json", "merges.txt")]
needs_mnist = unittest.skipUnless((DATA_DIR / "MNIST/raw").is_dir(), "DATA_DIR has no MNIST")
needs_gpt2_files = unittest.skipUnless(GPT2_FILES[0].is_file(), "DATA_DIR has no GPT-2 tokenizer")
needs_tiktoken = unittest.skipUnless(find_spec("tiktoken"), "tiktoken is not installed")
needs_processes = unittest.skipUnless(hasattr(os, "fork"), "starts processes as POSIX systems do")
# Processes are forked from one that has imported all this already.
PROCESSES = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else None)
PROCESSES.set_forkserver_preload(["torch._dynamo", "aae", "gpt", "vae"])
RANDOM_STRINGS = int(os.environ.get("RANDOM_STRINGS", 5_000))


def needs_transformers(test):
    @functools.wraps(test)
    def wrapper(self):
        try:
            import transformers

            transformers.GPT2LMHeadModel.from_pretrained  # noqa: B018 - fails beside an older torch
        except ImportError:
            self.skipTest("transformers is not installed, or too new for this torch")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        test(self)

    return wrapper


def setUpModule():
    # The tests' models are small: several threads would mostly wait for one another.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def run_main(main, *argv):
    """-> exit status, stdout, stderr of main(argv)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in argv]) or 0
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def snapshot(folder="."):
    """Every file below `folder` with its content's hash"""
    return {path: hashlib.md5(path.read_bytes()).hexdigest()
            for path in Path(folder).rglob("*") if path.is_file()}


def read_rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def identical(a, b):
    """Fail unless two tensors, or two dicts of tensors, are the same bit for bit."""
    assert_close(a, b, rtol=0, atol=0)


DRAW_GLYPHS = functools.cache(common.draw_glyphs)  # tests draw them once
AdversarialAE = aae.AdversarialAE  # itself: `quickly` replaces it


@contextlib.contextmanager
def quickly(module):
    """Within the `with` block the script draws nothing, and aae.py has a small model."""
    changes = {name: lambda *_, **__: None for name in vars(module) if name.startswith("draw_")}
    if module is aae:
        changes["AdversarialAE"] = functools.partial(AdversarialAE, num_filters=4)
    with mock.patch.multiple(module, **changes), mock.patch.object(common, "save_curves"):
        yield


class TemporaryFolder(unittest.TestCase):
    """Each test starts in an empty folder of its own."""

    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.enterContext(tempfile.TemporaryDirectory()))
        self.patch(common, "draw_glyphs", DRAW_GLYPHS)

    def enterContext(self, manager):  # for Python 3.10
        self.addCleanup(manager.__exit__, None, None, None)
        return manager.__enter__()

    def patch(self, owner, name, value):
        self.enterContext(mock.patch.object(owner, name, value))

    def assert_refused(self, module, *argv, saying=""):
        """The script ends in one line and status 2, and leaves everything as it was."""
        before = snapshot()
        status, out, err = run_main(module.main, *argv)
        self.assertEqual((status, out), (2, ""), argv)
        self.assertRegex(err.splitlines()[-1], f"^{module.__name__}.py: error: .*{saying}")
        self.assertNotIn("Traceback", err)
        self.assertEqual(snapshot(), before)


def serve(test, respond):
    """A server on localhost that answers with respond(handler, name of the file). -> its address"""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            respond(self, self.path.rsplit("/", 1)[-1])

        def log_message(self, *message):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    test.addCleanup(server.server_close)
    test.addCleanup(server.shutdown)
    return f"http://127.0.0.1:{server.server_port}"


def answer(handler, content, length=None):
    """Send `content`; `length`: another one than its own to announce"""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


# -- The variational autoencoder --------------------------------------------------------------


class VAEModel(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """A small model that has seen a few thousand glyphs"""
        torch.manual_seed(0)
        cls.images = vae.to_4_bits(DRAW_GLYPHS()[0])
        cls.model = vae.VAE(z_dim=20, num_filters=8)
        optimizer = torch.optim.Adam(cls.model.parameters(), lr=5e-3)
        for x in cls.images[:60_000].split(64)[:200]:
            rec, kl, _ = cls.model(x)
            optimizer.zero_grad()
            (rec + kl).backward()
            optimizer.step()
        cls.images = cls.images[60_000:]

    def test_pixels_become_4_bits_by_the_formula_of_the_practical(self):
        x = torch.arange(256, dtype=torch.uint8)
        formula = (x.double() / 255 * 16).floor().clamp(max=15)
        identical(vae.to_4_bits(x), formula.to(torch.uint8))

    def test_a_model_of_zeros_needs_exactly_4_bits_a_pixel_and_a_new_one_nearly(self):
        model = vae.VAE()
        self.assertAlmostEqual(model(self.images[:64])[2].item(), 4, delta=0.3)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        rec, kl, bpd = model(self.images[:64])
        self.assertAlmostEqual(rec.item(), 784 * math.log(16), delta=1e-3)
        self.assertEqual(kl.item(), 0)
        self.assertAlmostEqual(bpd.item(), 4, delta=1e-6)

    def test_training_beats_the_frequencies_of_pixel_values(self):
        frequency = torch.bincount(self.images.flatten().long(), minlength=16) / self.images.numel()
        entropy = -(frequency * frequency.clamp(min=1e-9).log2()).sum().item()
        bpd = vae.elbo_to_bpd(sum(vae.evaluate(self.model, self.images[:500])), [1, 1, 28, 28])
        self.assertLess(bpd, 0.9 * entropy)

    def test_kl_divergence_matches_torch_distributions_and_monte_carlo(self):
        torch.manual_seed(0)
        mean, log_std = torch.randn(2, 5, 3).double()
        q = torch.distributions.Normal(mean, log_std.exp())
        p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = vae.kl_divergence(mean, log_std)
        assert_close(kl, torch.distributions.kl_divergence(q, p).sum(-1))
        z = q.sample((100_000,))
        estimate = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(0)
        assert_close(kl, estimate, atol=0.03, rtol=0.01)

    def test_reparameterized_draws_have_the_moments_and_pass_gradients(self):
        torch.manual_seed(0)
        mean, std = torch.tensor([1., -2.]), torch.tensor([0.5, 3.])
        z = vae.sample_reparameterize(mean.expand(100_000, 2), std.expand(100_000, 2))
        assert_close(z.mean(0), mean, atol=0.05, rtol=0)
        assert_close(z.std(0), std, atol=0.05, rtol=0)
        mean, std = mean.requires_grad_(), std.requires_grad_()
        z = vae.sample_reparameterize(mean, std)
        z.sum().backward()
        assert_close(mean.grad, torch.ones(2))
        assert_close(std.grad, ((z - mean) / std).detach())

    def test_reconstruction_loss_is_the_categorical_log_probability(self):
        torch.manual_seed(0)
        logits, x = torch.randn(4, 16, 28, 28), self.images[:4]
        categorical = torch.distributions.Categorical(logits=logits.movedim(1, -1))
        expected = -categorical.log_prob(x.squeeze(1)).sum((1, 2))
        assert_close(vae.reconstruction_loss(logits, x), expected)

    def test_log_weight_matches_torch_distributions(self):
        torch.manual_seed(0)
        mean, log_std, z = torch.randn(3, 4, 20)
        x, normal = self.images[:4], torch.distributions.Normal
        expected = (normal(0, 1).log_prob(z) - normal(mean, log_std.exp()).log_prob(z)).sum(-1)
        expected = expected - vae.reconstruction_loss(self.model.decoder(z), x)
        assert_close(vae.log_weight(self.model, x, z, mean, log_std), expected)

    def test_evaluation_weighs_each_image_the_same(self):
        images = self.images[:501]  # the last batch has one
        rec, kl = vae.evaluate(lambda x: (x.double().mean(), -x.double().mean()), images)
        self.assertAlmostEqual(rec, images.double().mean().item(), places=9)
        self.assertAlmostEqual(kl, -rec, places=9)

    def test_log_std_is_bounded_and_keeps_its_gradient(self):
        encoder = vae.Encoder(z_dim=3)
        nn.init.zeros_(encoder.log_std.weight)
        for bias, expected in ((0, 0), (1, 1), (100, 5), (-100, -5)):
            nn.init.constant_(encoder.log_std.bias, bias)
            log_std = encoder(self.images[:2])[1]
            self.assertLess((log_std - expected).abs().max().item(), 0.02)
        nn.init.constant_(encoder.log_std.bias, 15)
        encoder(self.images[:2])[1].sum().backward()
        self.assertGreater(encoder.log_std.bias.grad.min().item(), 1e-3)

    def test_shapes_and_a_gradient_for_every_parameter(self):
        for z_dim, num_filters in ((1, 4), (7, 6)):
            model = vae.VAE(z_dim, num_filters)
            mean, log_std = model.encoder(self.images[:3])
            self.assertEqual((mean.shape, log_std.shape), ((3, z_dim), (3, z_dim)))
            self.assertEqual(model.decoder(mean).shape, (3, 16, 28, 28))
            rec, kl, _ = model(self.images[:8])
            (rec + kl).backward()
            for name, parameter in model.named_parameters():
                self.assertGreater(parameter.grad.abs().sum().item(), 0, name)

    def test_samples_follow_the_decoders_categorical(self):
        model = vae.VAE(z_dim=2, num_filters=4)
        for parameter in model.decoder.parameters():
            nn.init.zeros_(parameter)
        torch.manual_seed(0)
        logits = torch.randn(16)
        model.decoder.net[-1].bias.data = logits  # the same distribution for every pixel
        samples = model.sample(200)
        self.assertEqual(samples.shape, (200, 1, 28, 28))
        frequency = torch.bincount(samples.flatten(), minlength=16) / samples.numel()
        assert_close(frequency, logits.softmax(0), atol=0.005, rtol=0)

    def test_both_likelihood_estimates_equal_the_integral_at_one_dimension(self):
        class Toy(nn.Module):  # 2x2 images whose logits are linear in z, and a rough posterior
            def encoder(self, x):
                return torch.full((len(x), 1), 0.3), torch.full((len(x), 1), -0.2)

            def decoder(self, z):
                rows.append(len(z))
                return (z * slopes).view(-1, 16, 2, 2)

        torch.manual_seed(0)
        rows, model = [], Toy()
        slopes, x = torch.randn(64), torch.randint(16, (8, 1, 2, 2))
        z = torch.linspace(-8, 8, 4001).unsqueeze(1)
        log_prior = torch.distributions.Normal(0, 1).log_prob(z.squeeze(1))
        exact = torch.stack([
            (log_prior - vae.reconstruction_loss(model.decoder(z), image.expand(4001, 1, 2, 2)))
            .logsumexp(0) + math.log(16 / 4000) for image in x])
        for proposal in ("posterior", "prior"):
            rows.clear()
            estimate = vae.log_likelihood(model, x, 10_001, proposal)
            self.assertLess((estimate - exact).abs().max().item(), 0.05, proposal)
            self.assertEqual(sum(rows), 8 * 10_001)
            self.assertLessEqual(max(rows), 1000)  # memory does not grow with the draws

    def test_importance_weights_tighten_the_bound_and_the_prior_is_a_bad_proposal(self):
        x = self.images[:50]
        bound = -sum(vae.evaluate(self.model, x))
        weighted, prior = (vae.log_likelihood(self.model, x, 64, proposal).mean().item()
                           for proposal in ("posterior", "prior"))
        self.assertGreater(weighted, bound + 1)
        self.assertLess(prior, weighted - 30)

    def test_manifold_grows_to_the_right_and_upwards_over_the_percentiles(self):
        z = common.prior_grid(3)
        normal = torch.distributions.Normal(0, 1)
        expected = [[x, y] for y in (5 / 6, 1 / 2, 1 / 6) for x in (1 / 6, 1 / 2, 5 / 6)]
        assert_close(normal.cdf(z), torch.tensor(expected), atol=1e-5, rtol=0)
        decoder = vae.Decoder(z_dim=2, num_filters=4)
        image = vae.visualize_manifold(decoder, grid_size=3)
        self.assertEqual(image.shape, (84, 84))
        with torch.no_grad():
            corner = vae.mean_image(decoder(z[:1]))[0, 0]
        assert_close(image[:28, :28], corner)


# -- The adversarial autoencoder --------------------------------------------------------------


class AAEModel(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.x = aae.to_float(DRAW_GLYPHS()[0][:64])

    def test_shapes_and_ranges(self):
        self.assertEqual((self.x.min().item(), self.x.max().item()), (-1, 1))
        for z_dim, posterior in itertools.product((1, 20), aae.POSTERIORS):
            model = aae.AdversarialAE(z_dim, posterior)
            recon, z = model(self.x[:3])
            self.assertEqual((recon.shape, z.shape), ((3, 1, 28, 28), (3, z_dim)))
            self.assertEqual(model.discriminator(z).shape, (3, 1))
            self.assertLessEqual(model.decoder(100 * z).abs().max().item(), 1)

    def test_both_losses_match_their_formulas_for_any_lambda(self):
        model = aae.AdversarialAE()
        recon, z = model(self.x)
        logits = model.discriminator(z)
        for lam in (0, 0.3, 1):
            loss, rec, gen = model.autoencoder_loss(self.x, recon, z, lam)
            assert_close(rec, ((recon - self.x)**2).sum() / (64 * 784))
            assert_close(gen, -logits.sigmoid().log().mean() if lam < 1 else torch.tensor(0.))
            assert_close(loss, lam * rec + (1 - lam) * gen)
        torch.manual_seed(1)
        prior = torch.randn_like(z)
        torch.manual_seed(1)
        disc, _ = model.discriminator_loss(z)
        real = model.discriminator(prior)
        assert_close(disc, -(real.sigmoid().log() + (1 - logits.sigmoid()).log()).mean() / 2)

    def test_accuracy_counts_draws_of_the_prior_and_codes_alike(self):
        model = aae.AdversarialAE(z_dim=1)
        for slope, z, expected in ((1, -5., 0.75), (1, 5., 0.25), (0, 5., 0.5)):
            model.discriminator.forward = lambda z, slope=slope: slope * z  # draws: half above 0
            _, accuracy = model.discriminator_loss(torch.full((100_000, 1), z))
            self.assertAlmostEqual(accuracy.item(), expected, delta=0.01)

    def test_each_loss_has_gradients_for_its_own_networks(self):
        for posterior in aae.POSTERIORS:
            model = aae.AdversarialAE(posterior=posterior)
            recon, z = model(self.x)
            model.discriminator_loss(z.detach())[0].backward()
            for name, parameter in model.named_parameters():
                self.assertEqual(parameter.grad is None, not name.startswith("disc"), name)
            model.autoencoder_loss(self.x, recon, z, lam=0.995)[0].backward(retain_graph=True)
            for name, parameter in model.named_parameters():
                self.assertGreater(parameter.grad.abs().sum().item(), 0, (posterior, name))
            model.zero_grad()
            model.autoencoder_loss(self.x, recon, z, lam=0)[0].backward()
            for name, parameter in model.decoder.named_parameters():
                self.assertEqual(parameter.grad.abs().sum().item(), 0, (posterior, name))

    @torch.no_grad()
    def test_the_three_posteriors_draw_codes_as_they_should(self):
        x = self.x[:1].expand(5_000, -1, -1, -1)
        for posterior in aae.POSTERIORS:
            encoder = aae.AdversarialAE(2, posterior).encoder
            z = encoder(x[:200])
            if posterior == "deterministic":
                self.assertLess(z.std(0).max().item(), 1e-5)
            else:
                self.assertGreater(z.std(0).min().item(), 1e-3)
            if posterior == "gaussian":
                encoder.out.weight.zero_()
                encoder.out.bias.copy_(torch.tensor([1., -2., math.log(0.5), 0.]))
                z = encoder(x)
                assert_close(z.mean(0), torch.tensor([1., -2]), atol=0.05, rtol=0)
                assert_close(z.std(0), torch.tensor([0.5, 1]), atol=0.02, rtol=0)
                encoder.out.bias.fill_(1e4)
                self.assertTrue(encoder(x[:10]).isfinite().all())

    def test_samples_are_decoded_draws_of_the_prior(self):
        model = aae.AdversarialAE(z_dim=3)
        torch.manual_seed(5)
        samples = model.sample(4)
        torch.manual_seed(5)
        assert_close(samples, model.decoder(torch.randn(4, 3)))

    def test_sliced_wasserstein_distance_in_closed_form(self):
        a = torch.randn(20_000, 1)
        distance = aae.sliced_wasserstein
        self.assertAlmostEqual(distance(a, a + 0.7, 50), 0.7, places=5)  # a shift
        self.assertAlmostEqual(distance(a, a.flip(0), 50), 0, places=6)  # the same set
        # E|2z| - E|z| for twice the spread
        expected = math.sqrt(2 / math.pi)
        self.assertAlmostEqual(distance(a, 2 * torch.randn(20_000, 1), 50), expected, delta=0.03)
        a = torch.randn(2000, 2)
        shifted = distance(a, a + torch.tensor([3., 4]), 10_000)  # 5 times the mean of |cos|
        self.assertAlmostEqual(shifted, 5 * 2 / math.pi, delta=0.05)

    def test_maximum_mean_discrepancy_in_closed_form(self):
        # Of N(m, I) and N(0, I) in one dimension, where E k is a Gaussian's value at the distance.
        a, b = torch.randn(4000, 1).double() + 0.5, torch.randn(4000, 1).double()
        width = F.pdist(b[:1000]).median().item()
        peak = width / math.sqrt(width**2 + 2)  # E k(b, b')
        expected = 2 * peak * (1 - math.exp(-0.5**2 / (2 * (width**2 + 2))))
        self.assertAlmostEqual(aae.maximum_mean_discrepancy(a, b)**2, expected, delta=0.01)
        self.assertAlmostEqual(aae.maximum_mean_discrepancy(b, b), 0, delta=1e-6)

    def test_parzen_window_matches_torch_distributions(self):
        samples, x, sigma = torch.rand(30, 1, 28, 28), torch.rand(501, 1, 28, 28), 0.2
        normal = torch.distributions.Normal(samples.flatten(1).double(), sigma)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones(30)),
            torch.distributions.Independent(normal, 1))
        estimates = aae.parzen_log_likelihood(samples, x, [0.1, sigma])
        assert_close(estimates[1].double(), mixture.log_prob(x.flatten(1).double()),
                     atol=0.02, rtol=0)

    def test_evaluation_weighs_each_image_the_same_and_repeats_its_noise(self):
        model, images = aae.AdversarialAE(posterior="gaussian"), DRAW_GLYPHS()[0][:501]
        with torch.no_grad():
            mse, codes = aae.evaluate(model, images)
            self.assertEqual((mse, codes.shape), (aae.evaluate(model, images)[0], (501, 8)))
            expected = ((model.decoder(codes) - aae.to_float(images))**2).mean().item()
        self.assertAlmostEqual(mse, expected, places=5)
        moments = aae.code_moments(codes)
        self.assertAlmostEqual(moments["code_mean_max"], codes.mean(0).max().item(), places=6)
        self.assertAlmostEqual(moments["code_std_min"], codes.std(0).min().item(), places=2)


# -- GPT: the model and how it writes ---------------------------------------------------------


def small_gpt(spread=0.3, **changes):
    """A GPT in float64 whose attention is far from uniform, as it is in a trained one."""
    config = dict(vocab_size=61, block_size=24, n_layer=3, n_head=4, n_embd=32) | changes
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(**config)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=spread)
    return model.eval()


def numpy_gpt2(weights, n_head, ids):
    """GPT-2 once more, by itself. weights: {name: array}; ids: [T] -> logits [T, V]"""
    def layer_norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    T = len(ids)
    x = weights["wte.weight"][ids] + weights["wpe.weight"][:T]
    for i in range(sum(name.endswith("ln_1.bias") for name in weights)):
        qkv = dense(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        heads, parts = [], np.split(qkv, 3 * n_head, axis=-1)
        for q, k, v in zip(*(parts[j * n_head:(j + 1) * n_head] for j in range(3)), strict=True):
            weight = np.exp(q @ k.T / np.sqrt(k.shape[-1])) * np.tri(T)
            heads.append(weight / weight.sum(-1, keepdims=True) @ v)
        x = x + dense(np.concatenate(heads, axis=-1), f"h.{i}.attn.c_proj")
        h = dense(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h ** 3)))
        x = x + dense(h, f"h.{i}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ weights["wte.weight"].T


class GPTModel(unittest.TestCase):
    def setUp(self):
        self.model = small_gpt()
        self.idx = torch.randint(61, (5, 24), generator=torch.Generator().manual_seed(0))

    def test_logits_are_those_of_a_gpt2_in_numpy_and_no_position_sees_a_later_one(self):
        weights = {name: weight.numpy() for name, weight in self.model.state_dict().items()}
        for row, ids in zip(self.model(self.idx)[0], self.idx, strict=True):
            expected = torch.from_numpy(numpy_gpt2(weights, 4, ids.numpy()))
            assert_close(row, expected, rtol=1e-9, atol=1e-9)

    def test_fused_and_plain_attention_are_the_same_in_value_and_gradient(self):
        plain = small_gpt(fused=False)
        losses = [model(self.idx, self.idx.roll(-1, 1))[1] for model in (self.model, plain)]
        assert_close(*losses, rtol=1e-12, atol=0)
        for loss in losses:
            loss.backward()
        for (name, a), b in zip(self.model.named_parameters(), plain.parameters(), strict=True):
            assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)
            self.assertGreater(a.grad.abs().sum().item(), 0, name)

    def test_dropout_is_for_training_only(self):
        for fused in (True, False):
            model = small_gpt(dropout=0.2, fused=fused)
            expected = self.model(self.idx)[0]
            assert_close(model(self.idx)[0], expected)
            self.assertGreater((model.train()(self.idx)[0] - expected).abs().mean().item(), 0.1)

    def test_the_loss_is_the_mean_cross_entropy_and_not_in_bfloat16(self):
        targets = self.idx.roll(-1, 1)
        logits, loss = self.model(self.idx, targets)
        expected = -torch.distributions.Categorical(logits=logits).log_prob(targets).mean()
        assert_close(loss, expected)
        self.assertIsNone(self.model(self.idx)[1])
        logits, loss = small_gpt(spread=0.1).bfloat16()(self.idx, targets)
        self.assertEqual((logits.dtype, loss.dtype), (torch.bfloat16, torch.float32))
        assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))

    def test_a_new_model_knows_nothing_and_has_gpt2s_initial_weights(self):
        torch.manual_seed(0)
        model = gpt.GPT(gpt.GPTConfig(1000, 64, 8, 4, 128, dropout=0.1))
        idx = torch.randint(1000, (4, 64))
        self.assertAlmostEqual(model(idx, idx.roll(1, 1))[1].item(), math.log(1000), delta=0.1)
        for name, parameter in model.named_parameters():
            std = 0.01 if name == "wpe.weight" else 0.02 / 4 ** name.endswith("c_proj.weight")
            if parameter.dim() == 2:
                self.assertAlmostEqual(parameter.std().item() / std, 1, delta=0.05, msg=name)
            else:
                one = "ln" in name and name.endswith("weight")
                self.assertEqual(parameter.unique().tolist(), [float(one)])

    def test_sizes_of_gpt2_and_operations_per_token(self):
        with torch.device("meta"):
            for name, millions in (("gpt2", 124.439808), ("gpt2-medium", 354.823168),
                                   ("gpt2-large", 774.030080), ("gpt2-xl", 1557.6112)):
                model = gpt.GPT(gpt.GPTConfig(50257, 1024, *gpt.SIZES[name]))
                self.assertEqual(sum(p.numel() for p in model.parameters()), millions * 1e6, name)
            model = gpt.GPT(gpt.GPTConfig(50257, 1024, *gpt.SIZES["gpt2"]))
        matrices = 12 * 12 * 768**2 + 50257 * 768
        self.assertAlmostEqual(gpt.flops_per_token(model) / (6 * matrices + 12 * 12 * 1024 * 768),
                               1, places=2)
        with self.assertRaisesRegex(ValueError, "n_embd 100 is not a multiple of n_head 3"):
            gpt.GPTConfig(10, 10, 1, 3, 100)
        for size in (0, -1, 1.0, "1"):
            with self.assertRaisesRegex(ValueError, "n_head .* is not a whole number above 0"):
                gpt.GPTConfig(10, 10, 1, size, 100)

    def test_rows_that_pad_the_vocabulary_change_nothing(self):
        padded = small_gpt(padded_vocab_size=64)
        self.assertEqual(padded.wte.weight.shape[0], 64)
        with torch.no_grad():
            padded.load_state_dict(self.model.state_dict() | {
                "wte.weight": torch.cat([self.model.wte.weight, torch.ones(3, 32)])})
        for a, b in zip(padded(self.idx, self.idx), self.model(self.idx, self.idx), strict=True):
            assert_close(a, b)

    def test_16_bit_layers_have_logits_in_32_and_generate(self):
        exact = small_gpt(spread=0.1).float()
        for dtype in (torch.bfloat16, torch.float16):
            model = small_gpt(spread=0.1).float()
            model.h.to(dtype)
            logits = model(self.idx)[0]
            self.assertEqual(logits.dtype, torch.float32)
            assert_close(logits, exact(self.idx)[0], atol=0.1, rtol=0)
            self.assertEqual(model.generate(self.idx, 30).shape, (5, 54))


class Generation(unittest.TestCase):
    setUp = GPTModel.setUp

    def test_cached_text_is_that_of_a_pass_over_the_whole_window_for_each_token(self):
        for fused, B, T, options in (
                (False, 5, 7, {"temperature": 1.5}), (True, 1, 40, {"do_sample": False}),
                *((True, B, T, {"temperature": 1.5}) for B in (1, 5) for T in (1, 24, 40)),
                *((True, 5, 3, o) for o in ({"do_sample": False}, {"temperature": 0}))):
            model, idx = small_gpt(fused=fused), self.idx.repeat(1, 2)[:B, :T]
            cached = model.generate(idx, 45, generator=torch.Generator().manual_seed(1), **options)
            generator, plain = torch.Generator().manual_seed(1), idx
            for _ in range(45):
                token = gpt.next_token(model(plain[:, -24:])[0][:, -1], generator=generator,
                                       **options)
                plain = torch.cat([plain, token], dim=1)
            identical(cached, plain)

    def test_greedy_is_the_most_probable_token_whichever_way_it_is_asked_for(self):
        idx = self.idx[:, :3]
        for _ in range(30):
            logits = self.model(idx[:, -24:])[0]
            idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        for options in ({"do_sample": False}, {"temperature": 0}, {"temperature": 1e-40},
                        {"top_k": 1}, {"top_p": 0}):
            identical(self.model.generate(self.idx[:, :3], 30, **options), idx)

    def test_a_row_that_came_to_the_stop_token_stays_so_and_when_all_have_it_ends(self):
        script = iter(torch.tensor([[1, 2], [9, 3], [5, 4], [6, 9], [7, 7]]).unsqueeze(-1))
        with mock.patch.object(gpt, "next_token", lambda *_, **__: next(script)):
            tokens = self.model.generate(self.idx[:2, :4], 7, stop_token=9)
        self.assertEqual(tokens[:, 4:].tolist(), [[1, 9, 9, 9, 9, 9, 9], [2, 3, 4, 9, 9, 9, 9]])
        self.assertEqual(len(list(script)), 1)

    def test_no_new_token_is_the_prompt_itself_and_an_empty_prompt_is_refused(self):
        identical(self.model.generate(self.idx, 0), self.idx)
        for idx in (self.idx[0], self.idx[:, :0], self.idx[:0]):
            with self.assertRaisesRegex(ValueError, "idx has to be"):
                self.model.generate(idx, 3)
        for options in ({"top_k": -1}, {"temperature": -0.5}):
            with self.assertRaisesRegex(ValueError, "must not be negative"):
                self.model.generate(self.idx, 3, **options)

    def test_generating_does_not_disturb_training(self):
        self.model.train()
        state = torch.get_rng_state()
        tokens = self.model.generate(self.idx, 3, generator=torch.Generator().manual_seed(0))
        identical(torch.get_rng_state(), state)
        self.assertTrue(self.model.training)
        with self.assertRaises(IndexError):
            self.model.generate(self.idx + 99, 3)
        self.assertTrue(self.model.training)
        self.model(tokens[:, -24:], tokens[:, -24:])[1].backward()  # they are ordinary tensors

    def draws(self, probabilities, number=2000, **options):
        """The share of each token among `number` draws"""
        logits = torch.tensor(probabilities).log().expand(number, -1)
        generator = torch.Generator().manual_seed(0)
        tokens = gpt.next_token(logits, generator=generator, **options)
        self.assertEqual(tokens.shape, (number, 1))
        return torch.bincount(tokens.flatten(), minlength=len(probabilities)) / number

    def test_top_p_keeps_the_fewest_tokens_that_make_up_the_mass(self):
        for top_p, kept in ((0, 1), (0.4, 1), (0.5, 1), (0.501, 2), (0.9, 2), (0.92, 3), (1, 3)):
            shares = self.draws([0.09, 0.5, 0.41], top_p=top_p)
            self.assertEqual([i for i in (1, 2, 0) if shares[i]], [1, 2, 0][:kept], top_p)
        # at the boundary itself, where the first of two has exactly the mass that is asked for
        self.assertEqual(self.draws([0.25, 0.25], top_p=0.5)[1], 0)
        # of the two that top-k leaves, the first has 0.55 of the mass
        self.assertEqual(self.draws([0.5, 0.41, 0.09], top_k=2, top_p=0.54)[1], 0)
        self.assertGreater(self.draws([0.5, 0.41, 0.09], top_k=2, top_p=0.56)[1], 0.4)

    def test_top_k_keeps_k_tokens_even_of_equal_ones(self):
        for top_k, kept in ((None, 10), (0, 10), (1, 1), (3, 3), (10, 10), (10**6, 10)):
            self.assertEqual((self.draws([0.1] * 10, top_k=top_k) > 0).sum(), kept, top_k)

    def test_draws_follow_the_distribution_at_any_temperature(self):
        p = torch.tensor([0.6, 0.3, 0.1])
        for temperature in (0.5, 1.0, 2.0):
            expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
            shares = self.draws(p.tolist(), 50_000, temperature=temperature)
            assert_close(shares, expected, atol=0.01, rtol=0)


# -- GPT: tokenizers --------------------------------------------------------------------------


def byte_characters():
    """How GPT-2's files write the 256 bytes"""
    characters, others = [], iter(range(256, 512))
    for byte in range(256):
        itself = 33 <= byte < 127 or 161 <= byte < 256 and byte != 173
        characters.append(chr(byte if itself else next(others)))
    return characters


def tiktoken_gpt2(vocab, merges):  # merges follow from the ranks
    import tiktoken

    byte = {character: bytes([b]) for b, character in enumerate(byte_characters())}
    ids = json.loads(Path(vocab).read_text(encoding="utf-8"))
    ranks = {b"".join(map(byte.get, token)): id for token, id in ids.items() if id < 50256}
    return tiktoken.Encoding(
        "gpt2", explicit_n_vocab=50257, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256}, pat_str="'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?"
        "\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+")


def write_json(path, content):
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def own_files(*merges, special=("<|endoftext|>",), folder="."):
    """The files of a small vocabulary: 256 bytes, what `merges` make, and special tokens."""
    tokens = [*byte_characters(), *(merge.replace(" ", "") for merge in merges), *special]
    paths = Path(folder, "vocab.json"), Path(folder, "merges.txt")
    write_json(paths[0], {token: i for i, token in enumerate(tokens)})
    paths[1].write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    return tuple(map(str, paths))


class Tokenizers(TemporaryFolder):
    def test_pairs_merge_in_the_order_of_the_list_and_from_left_to_right(self):
        tokenizer = gpt.BPETokenizer(*own_files("b c", "a a", "a b", "aa a", "Ġ a", "bc bc"))
        tokens = dict(enumerate(json.loads(Path("vocab.json").read_text("utf-8"))))
        for text, expected in (("abc", "a bc"), ("ab", "ab"), ("aaaaa", "aa aaa"), ("aab", "aa b"),
                               ("bcbcbc", "bcbc bc"), (" a ab", "Ġa Ġ ab"), ("a" * 7, "aa aa aaa"),
                               ("", ""), ("x", "x"), ("bb", "b b")):
            self.assertEqual([tokens[i] for i in tokenizer.encode(text)], expected.split(), text)
            self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

    def test_special_and_added_tokens_in_a_text_are_one_token(self):
        plain = gpt.BPETokenizer(*own_files(special=()))
        self.assertEqual((plain.end_of_text, plain.start, plain.special), (None, 0, {}))
        self.assertEqual(len(plain.encode("a<|endoftext|>")), 14)
        files = own_files(special=("<pad>", "<|endoftext|>"))
        write_json("added_tokens.json", {"<|user|>": 258, "<|user|>!": 259, "user": 260})
        tokenizer = gpt.BPETokenizer(*files)
        self.assertEqual((tokenizer.end_of_text, tokenizer.start, len(tokenizer)), (257, 257, 261))
        self.assertEqual((tokenizer.num_bytes(258), tokenizer.num_bytes(97)), (8, 1))
        for text, ids in (("<|endoftext|><|endoftext|>", [257, 257]), ("<|user|>", [258]),
                          ("<|user|>!", [259]), ("<|user", [*plain.encode("<|"), 260]),
                          ("  <|user|>", [*plain.encode("  "), 258]),
                          ("<pad>", plain.encode("<pad>"))):
            self.assertEqual(tokenizer.encode(text), ids, text)
            self.assertEqual(tokenizer.encode(text, special=False), plain.encode(text))
            self.assertEqual(tokenizer.decode(ids), text)

    def test_a_text_in_pieces_has_the_tokens_of_the_whole_text(self):
        files = own_files("l l", "' ll", "Ġ a", "Ġ Ġ", "a b", "ab ab")
        write_json("added_tokens.json", {"<|user|>": 263, "<|user|>!": 264, "user": 265, "<|": 266})
        tokenizer, generator = gpt.BPETokenizer(*files), random.Random(0)
        parts = ["a", "ab" * 40, " ", " " * 50, "'", "l", "'ll", "'ve", "\n", "1", "é😀", "\ud83d",
                 "\ude00", "!", "<|endoftext|>", "<|user|>", "<|user", "<|user|>!", "<|", "<"]
        for _ in range(500):
            text = "".join(generator.choices(parts, k=generator.randrange(40)))
            number = generator.choice([0, 1, 5, len(text)])
            cuts = sorted(generator.choices(range(len(text) + 1), k=number))
            cut = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
            for pieces in (cut, list(text)):
                ids = [id for some in tokenizer.encode_pieces(iter(pieces)) for id in some]
                self.assertEqual(ids, tokenizer.encode(text), pieces)

    def test_text_without_white_space_takes_linear_time_and_only_the_last_word_waits(self):
        tokenizer = gpt.BPETokenizer(*own_files())
        pattern, scanned = gpt.word_pattern(), []
        watched = mock.Mock(findall=lambda text: scanned.append(len(text)) or pattern.findall(text))
        with mock.patch.object(gpt, "word_pattern", lambda: watched):
            for character, size in itertools.product("a\u4e00<'", (1, 50)):
                scanned.clear()
                for length in (1000, 2000):
                    lists = tokenizer.encode_pieces(itertools.repeat(character * size, length))
                    self.assertEqual(sum(map(len, lists)), length * size * len(character.encode()))
                    # a character is scanned at most a few times, whatever the length
                    self.assertLess(sum(scanned), 4 * 3000 * size)
            scanned.clear()
            for _ in tokenizer.encode_pieces(itertools.repeat("some words, ", 1000)):
                self.assertLess(max(scanned), 100)
        operations = []
        for length in (10_000, 20_000):
            letters = "".join(random.Random(0).choices("ACGT", k=length))
            merged = gpt.BPETokenizer(*own_files("A C", "G T", "AC GT", "A A", "AC AC"))
            with mock.patch.object(gpt.heapq, "heappop", wraps=gpt.heapq.heappop) as pops:
                self.assertEqual(merged.decode(merged.encode(letters)), letters)
            operations.append(pops.call_count)
        self.assertLess(operations[1], 2.1 * operations[0])

    def test_any_ids_decode_and_half_characters_wait_for_the_rest(self):
        tokenizer = gpt.BPETokenizer(*own_files())
        ids = list("né😀\n".encode())
        self.assertEqual(list(tokenizer.stream(ids)), ["n", "", "é", "", "", "", "😀", "\n", ""])
        self.assertEqual(tokenizer.decode(ids[:-2]), "né\ufffd")
        self.assertEqual(tokenizer.decode([0xff, 0xc3, 0x28, 10**9]), "\ufffd\ufffd(\ufffd")
        self.assertEqual(tokenizer.decode(torch.tensor([-1, 97])), "\ufffda")
        self.assertEqual(tokenizer.decode(tokenizer.encode("\ud83d\ude00 a\ud83d\0")),
                         "😀 a\ufffd\0")  # surrogates are joined or replaced

    def test_words_are_split_as_unicode_says(self):
        split = gpt.word_pattern().findall
        for text, words in (
                ("I'm he'LL", ["I", "'m", " he", "'", "LL"]),
                ("a_b", ["a", "_", "b"]),
                ("x² ½ Ⅷ", ["x", "²", " ½", " Ⅷ"]),  # numbers that are no digits
                ("a\x1cb \x1f", ["a", "\x1c", "b", " \x1f"]),  # no white space
                ("a  b\u2003\u3000c", ["a", " ", " b", "\u2003", "\u3000", "c"]),
                ("e\u0301", ["e", "\u0301"]),  # a combining mark is no letter
                ("a\r\n\n b ", ["a", "\r\n\n", " b", " "]),
                ("𝒳 𐍈1", ["𝒳", " 𐍈", "1"])):
            self.assertEqual(split(text), words)

    @needs_gpt2_files
    @needs_tiktoken
    def test_gpt2_token_ids_of_random_texts_are_tiktokens(self):
        oracle, tokenizer = tiktoken_gpt2(*GPT2_FILES), gpt.BPETokenizer(*GPT2_FILES)
        assigned = [chr(code) for code in range(sys.maxunicode + 1)
                    if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
        hard = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u2028'sdmtlrevSLT0129½²Ⅷ_aAé\u0301\u200d日.-"
        generator = random.Random(0)
        for _ in range(RANDOM_STRINGS):
            pool = generator.choice([assigned, assigned[:3000], assigned[:128], hard])
            text = "".join(generator.choices(pool, k=generator.randrange(1, 40)))
            if generator.random() < 0.3:
                text = "".join(c + generator.choice([" ", "", "'s"]) for c in text)
            ids = tokenizer.encode(text)
            self.assertEqual(ids, oracle.encode(text, disallowed_special=()))
            self.assertEqual(tokenizer.decode(ids), text)

    def one_file(self):
        """The content of a tokenizer.json with a small vocabulary"""
        vocab, merges = own_files("a b", "ab c")
        lines = Path(merges).read_text("utf-8").split("\n")[1:-1]
        return {"normalizer": None, "added_tokens": [{"id": 258, "content": "<|endoftext|>"},
                                                     {"id": 259, "content": "<|a b|>"}],
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                "model": {"type": "BPE", "dropout": None, "end_of_word_suffix": "",
                          "vocab": json.loads(Path(vocab).read_text("utf-8")), "merges": lines}}

    def test_tokenizer_json_is_read_and_saved(self):
        pairs, lines, same = self.one_file(), self.one_file(), []
        pairs["model"]["merges"] = [line.split(" ") for line in pairs["model"]["merges"]]
        for saved in (pairs, lines):
            write_json("tokenizer.json", saved)
            same.append(gpt.BPETokenizer("tokenizer.json"))
            self.assertEqual(same[-1].encode("abc<|a b|><|endoftext|>"), [257, 259, 258])
        Path("hub").mkdir()
        same[0].save("hub")
        same.append(gpt.load_tokenizer_files(Path("hub")))
        for tokenizer in same:
            self.assertEqual((tokenizer.fingerprint, tokenizer.special, tokenizer.bytes_of),
                             (same[0].fingerprint, same[0].special, same[0].bytes_of))
        others = [gpt.BPETokenizer(*own_files(*merges, special=special)).fingerprint
                  for merges, special in (((), ("<pad>",)), (("a b",), ("<pad>",)))]
        self.assertEqual(len({same[0].fingerprint, *others}), 3)

    def test_other_kinds_of_tokenizer_json_are_refused_by_name(self):
        whole = self.one_file()
        token = {"id": 258, "content": "<|endoftext|>", "lstrip": True}
        for part, change, saying in (
                ("normalizer", {"type": "NFC"}, "type of its normalizer is 'NFC', not None"),
                ("pre_tokenizer", None, "type of its pre_tokenizer is None, not 'ByteLevel'"),
                *(("pre_tokenizer", whole["pre_tokenizer"] | {name: value}, f"is {value!r}")
                  for name, value in (("type", "Whitespace"), ("add_prefix_space", True),
                                      ("use_regex", False))),
                *(("model", whole["model"] | {name: value}, f"{name} of its model is {value!r}")
                  for name, value in (("type", "Unigram"), ("dropout", 0.1),
                                      ("byte_fallback", True), ("ignore_merges", True),
                                      ("end_of_word_suffix", "</w>"))),
                ("model", {"type": "BPE"}, "damaged"), ("model", [], "damaged"),
                ("added_tokens", [token], "lstrip of its added token is True")):
            write_json("tokenizer.json", whole | {part: change})
            with self.assertRaisesRegex(ValueError, f"tokenizer.json.*{saying}"):
                gpt.BPETokenizer("tokenizer.json")

    def test_tokenizer_files_that_are_damaged_or_missing_are_named(self):
        own_files("a b", "ab c", special=("<|endoftext|>", "<pad>"))
        whole = {name: Path(name).read_text("utf-8") for name in ("vocab.json", "merges.txt")}
        vocab, merges = whole.values()
        pointer = "version https://git-lfs.github.com/spec/v1"
        for name, text, error in (
                *(("merges.txt", text, ValueError) for text in (
                    merges[:-5], merges + "x y\n", "<!DOCTYPE html>\n<html>404 Not Found")),
                *(("vocab.json", text, ValueError) for text in (
                    "", "[]", "{}", "[" * 100_000, "\ufeff\ufeff", pointer, vocab[:100],
                    vocab.replace("257", "256"), vocab.replace("<pad>", ""))),
                *(("added_tokens.json", text, ValueError) for text in (
                    '{"<x>": 261}', '{"<x>": 1}', "{")),
                ("merges.txt", None, FileNotFoundError), ("vocab.json", None, FileNotFoundError)):
            Path(name).unlink(missing_ok=True)
            if text is not None:
                Path(name).write_text(text, "utf-8")
            with self.assertRaisesRegex(error, r"\w+\.(json|txt)") as raised:
                gpt.load_tokenizer_files(Path("."))
            self.assertNotIn("\n", str(raised.exception))
            Path("added_tokens.json").unlink(missing_ok=True)
            for intact, text in whole.items():
                Path(intact).write_text("\ufeff" + text, "utf-8")  # a byte-order mark is skipped
        self.assertEqual(len(gpt.load_tokenizer_files(Path("."))), 260)

    @needs_gpt2_files
    @needs_transformers
    def test_transformers_reads_and_writes_the_same_tokenizer(self):
        from transformers import GPT2TokenizerFast

        text = "Hello'll <|user|>  there<|endoftext|>\n\n日本 <pad>"
        ours = gpt.BPETokenizer(*GPT2_FILES)
        merges = GPT2_FILES[1].read_text("utf-8").split("\n")[1:-1]
        theirs = GPT2TokenizerFast(vocab=ours.vocab, merges=[tuple(m.split(" ")) for m in merges])
        theirs.add_tokens(["<|user|>"])
        theirs.add_special_tokens({"pad_token": "<pad>"})
        theirs.save_pretrained("saved")
        ours = gpt.load_tokenizer_files(Path("saved"))
        self.assertEqual(ours.encode(text), theirs.encode(text))
        Path("hub").mkdir()
        ours.save("hub")
        self.assertEqual(GPT2TokenizerFast.from_pretrained("hub").encode(text), ours.encode(text))

    def test_characters_as_tokens(self):
        tokenizer = gpt.CharTokenizer("\n abcé")
        Path("hub").mkdir()
        tokenizer.save("hub")
        self.assertEqual(os.listdir("hub"), ["vocab.json"])
        again = gpt.load_tokenizer_files(Path("hub"))
        self.assertEqual((again.characters, again.fingerprint),
                         (tokenizer.characters, tokenizer.fingerprint))
        self.assertEqual((len(again), again.num_bytes(5), again.start, again.end_of_text),
                         (6, 2, 0, None))
        self.assertEqual(tokenizer.encode("cab\n"), [4, 2, 3, 0])
        self.assertEqual(list(tokenizer.encode_pieces(iter(["ca", "b"]))), [[4, 2], [3]])
        self.assertEqual(tokenizer.decode([4, 2, 3, 0, 99, -1]), "cab\n\ufffd\ufffd")
        self.assertEqual(list(tokenizer.stream(torch.tensor([2, 3]))), ["a", "b"])
        with self.assertRaisesRegex(ValueError, "never saw 'dx'"):
            tokenizer.encode("axbxd")


# -- GPT: weights on disk ---------------------------------------------------------------------


def hub_tensors(model):
    """The weights of a GPT as the public checkpoints hold them, [in, out]."""
    return {name: (w.t() if ".c_" in name and w.dim() == 2 else w).float().contiguous()
            for name, w in model.state_dict().items()}


def write_safetensors(path, tensors):
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.bool: "BOOL", torch.uint8: "U8"}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(content), len(content) + len(data)]}
        content += data
    header = json.dumps(header).encode()
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + content)


def write_hub_folder(folder, model, tensors=None, **settings):
    """A folder as on the hub, with model.safetensors"""
    config, folder = model.config, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {
        "model_type": "gpt2", "vocab_size": config.vocab_size, "n_positions": config.block_size,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd} | settings)
    write_safetensors(folder / "model.safetensors", tensors or hub_tensors(model))


def write_shards(folder, tensors, kind):
    """Weights in three files with an index of them. kind: "safetensors" or "bin" """
    stem, save = (("model", write_safetensors) if kind == "safetensors" else
                  ("pytorch_model", lambda path, tensors: torch.save(tensors, path)))
    names, shards = list(tensors), {}
    for i in range(3):
        shards |= dict.fromkeys(names[i::3], f"{stem}-0000{i + 1}-of-00003.{kind}")
        save(Path(folder, f"{stem}-0000{i + 1}-of-00003.{kind}"),
             {name: tensors[name] for name in names[i::3]})
    write_json(Path(folder, f"{stem}.{kind}.index.json"), {"weight_map": shards})


def serve_hub(test, model, name="openai-community/gpt2", broken=None, wait=lambda: None):
    """A server on localhost in the hub's place, with the folder hub/NAME; the file `broken` breaks
    off, and in the middle of weights it calls `wait`. -> a list to which paths asked for are added
    """
    asked, hub = [], Path("hub").resolve()
    write_hub_folder(hub / name, model)
    own_files(folder=hub / name)

    def respond(handler, file):
        path = handler.path[1:].replace("/resolve/main", "")
        asked.append(path)
        if not (hub / path).is_file():
            return handler.send_error(404 if (hub / path).parent.is_dir() else 401)
        content = (hub / path).read_bytes()
        answer(handler, content[:50], len(content))
        if file == "model.safetensors":
            wait()
        handler.wfile.write(content[50:-50] if file == broken else content[50:])

    replace_hub(test, serve(test, respond))
    return asked


def replace_hub(test, address):
    """Another address for the hub, and an empty cache"""
    test.patch(gpt, "HUB", address)
    test.patch(torch.hub, "get_dir", lambda: "cache")


def load_within(folder, size, times):
    """Load a model of `size` bytes in `times` as much memory, the file's own mapping included."""
    import resource

    status = Path("/proc/self/status").read_text()
    used = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1])
    resource.setrlimit(resource.RLIMIT_DATA, 2 * (int(used + times * size),))
    gpt.load_model(folder)


class Pretrained(TemporaryFolder):
    def setUp(self):
        super().setUp()
        self.enterContext(contextlib.redirect_stderr(io.StringIO()))  # of progress
        self.model = small_gpt().float()
        self.tensors = hub_tensors(self.model)

    def assert_loaded(self, path, tolerance=0.0):
        model = gpt.GPT.from_pretrained(path)
        self.assertFalse(model.training)
        self.assertEqual(model.wte.weight.dtype, torch.float32)
        assert_close(model.state_dict(), self.model.state_dict(), rtol=0, atol=tolerance)

    def assert_not_loaded(self, saying, path="m", kind=(ValueError, FileNotFoundError), **changes):
        if changes:
            write_hub_folder(path, self.model, **changes)
        with self.assertRaisesRegex(kind, saying) as raised:
            gpt.GPT.from_pretrained(path)
        self.assertLess(len(str(raised.exception)), 400)
        self.assertNotIn("\n", str(raised.exception))

    def test_every_layout_of_the_hub_is_read(self):
        prefixed = {f"transformer.{name}": tensor for name, tensor in self.tensors.items()}
        wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in prefixed.items()}
        masks = {"h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool),
                 "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
        head = {"lm_head.weight": self.tensors["wte.weight"]}
        headed = {n: t for n, t in prefixed.items() if "wte" not in n} | head
        for tensors in (self.tensors, wrapped, self.tensors | masks, prefixed | head, headed):
            for folder in ("m", "gpt2"):  # where it is there, a folder goes before the hub
                write_hub_folder(folder, self.model, tensors=tensors)
                self.assert_loaded(folder)
            for kind in ("safetensors", "bin"):
                for path in Path("m").glob("*model*"):
                    path.unlink()
                write_shards("m", tensors, kind)
                self.assert_loaded(Path("m"))
            for new in (True, False):  # torch's format of today, and that before 1.6
                torch.save(tensors, "m/pytorch_model.bin", _use_new_zipfile_serialization=new)
                self.assert_loaded("m")
        for dtype, tolerance in ((torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
            halves = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
            write_hub_folder("m", self.model, tensors=halves)
            self.assert_loaded("m", tolerance)

    def test_training_a_loaded_model_does_not_write_into_its_file(self):
        write_hub_folder("m", self.model)
        before = snapshot("m")
        with torch.no_grad():
            for parameter in gpt.load_model("m", dropout=0.5).train().parameters():
                parameter.zero_()
        self.assertEqual(snapshot("m"), before)

    def test_a_tensor_that_is_missing_twice_there_or_misshapen_is_named(self):
        tensors, zeros = self.tensors, torch.zeros(32)
        missing = {name: tensor for name, tensor in tensors.items() if name != "h.1.ln_2.bias"}
        turned = {"h.0.attn.c_attn.weight": tensors["h.0.attn.c_attn.weight"].t()}
        heads = {f"v_head.{i}.weight": zeros for i in range(100)}
        for saying, changed in (
                ("h.1.ln_2.bias is missing", missing),
                ("h.3.ln_1.bias is .* should be absent", tensors | {"h.3.ln_1.bias": zeros}),
                ("v_head.0.weight .* and 97 more$", tensors | heads),
                ("ln_f.bias is there twice", tensors | {"transformer.ln_f.bias": zeros}),
                ("ln_f.bias is .* not of floating", tensors | {"ln_f.bias": zeros.byte()}),
                (r"c_attn.weight is \(32, 96\), should be \(96, 32\)", tensors | turned),
                ("lm_head.weight differs from wte",
                 tensors | {"lm_head.weight": tensors["wte.weight"] + 1e-6})):
            self.assert_not_loaded(saying, tensors=changed)
        self.assert_not_loaded(r"wpe.weight is \(24, 32\), should be \(23, 32\)", n_positions=23)

    def test_other_architectures_are_refused_by_name(self):
        for setting, value in (
                ("model_type", "gpt_neo"), ("activation_function", "relu"),
                ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False),
                ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True),
                ("add_cross_attention", True), ("eos_token_id", "</s>"), ("n_head", 5),
                ("n_layer", "3")):
            self.assert_not_loaded(f"config.json.*{setting}", **{setting: value})

    def test_the_token_that_ends_a_text_is_read(self):
        for settings, expected in (({}, None), ({"eos_token_id": None}, None),
                                   ({"eos_token_id": 2}, 2), ({"eos_token_id": [3, 2]}, 3)):
            write_hub_folder("m", self.model, **settings)
            self.assertEqual(gpt.load_model("m").config.eos_token_id, expected)

    def test_model_files_that_are_damaged_or_missing_are_named(self):
        replace_hub(self, "http://127.0.0.1:9")
        Path("runs").mkdir()
        for path in ("nowhere", "runs/gpt-shakespaere", "a/b/c", "../a"):
            self.assert_not_loaded("is not a folder, nor one of gpt2, gpt2-medium", path)
        self.assert_not_loaded("config.json is not there: put it into this folder", "")
        write_hub_folder("m", self.model)
        whole = Path("m/model.safetensors").read_bytes()
        torch.save(self.tensors, "bin")
        flipped = bytearray(Path("bin").read_bytes())
        flipped[len(flipped) // 2] ^= 1
        torch.save([], "list")
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        for name, contents in {
                "model.safetensors": [
                    b"", whole[:500], whole[:-1], whole + b"more", b"<!DOCTYPE html> 404" * 100,
                    (2**60).to_bytes(8, "little") + whole[8:], whole.replace(b"F32", b"F4_")],
                "pytorch_model.bin": [b"", b"half a check", flipped, Path("list").read_bytes()],
                "model.safetensors.index.json": [b"", b"[]", b"{}", b'{"weight_map": [1]}'],
                "config.json": [b"", b"[]", b"{}", b"[" * 100_000, b"\xff"]}.items():
            Path("m/model.safetensors").unlink(missing_ok=True)
            for content in (*contents, pointer):
                Path("m", name).write_bytes(content)
                self.assert_not_loaded(f"m/{name} is damaged .*" + (
                    "git lfs pull" if content == pointer else "put a sound copy"))
            os.remove(f"m/{name}")
            self.assert_not_loaded("not there|no weights")
            write_hub_folder("m", self.model)
        os.remove("m/model.safetensors")
        write_shards("m", self.tensors, "safetensors")
        os.remove("m/model-00002-of-00003.safetensors")
        self.assert_not_loaded("model-00002-of-00003.safetensors is not there")

    def test_a_pickle_is_never_run(self):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, ("harmed",)

        write_hub_folder("m", self.model)
        os.remove("m/model.safetensors")
        torch.save(self.tensors | {"more": Harmful()}, "m/pytorch_model.bin")
        self.assert_not_loaded("pytorch_model.bin is damaged or not a GPT-2's")
        self.assertFalse(Path("harmed").exists())

    @unittest.skipUnless(sys.platform == "linux", "needs Linux's limit on memory")
    def test_loading_takes_little_more_memory_than_the_weights(self):
        write_hub_folder("one", gpt.GPT(gpt.GPTConfig(50257, 64, 2, 4, 512)))  # 128 MB
        shutil.copytree("one", "shards")
        write_shards("shards", hub_tensors(gpt.load_model("one")), "safetensors")
        os.remove("shards/model.safetensors")
        for folder in ("one", "shards"):
            process = PROCESSES.Process(target=load_within, args=(folder, 128e6, 2.5))
            process.start()
            process.join()
            self.assertEqual(process.exitcode, 0)

    def test_a_saved_model_is_read_back_and_every_flipped_bit_is_noticed(self):
        torch.manual_seed(0)
        sizes = [np.int64(size) for size in (61, 24, 3, 4, 32)]  # numpy's integers are fine
        padded = gpt.GPT(gpt.GPTConfig(*sizes, eos_token_id=7, padded_vocab_size=64))
        gpt.save_model(padded, "m/run")
        model = gpt.GPT.from_pretrained("m/run")
        self.assertEqual(model.config, gpt.GPTConfig(61, 24, 3, 4, 32, eos_token_id=7))
        idx = torch.randint(61, (2, 24))
        assert_close(model(idx)[0], padded(idx)[0][..., :61], rtol=0, atol=1e-6)
        self.assertEqual(sorted(os.listdir("m/run")), ["config.json", "model.safetensors"])
        path = Path("m/run/model.safetensors")
        whole = path.read_bytes()
        self.assertEqual(int.from_bytes(whole[:8], "little") % 8, 0)  # where tensors are aligned
        for place in (len(whole) - 1, len(whole) // 2, whole.index(b"crc32") + 10):
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            self.assert_not_loaded("model.safetensors is damaged .*checksum", "m/run")

    def test_a_stop_while_saving_leaves_the_model_before(self):
        gpt.save_model(self.model, "m")
        with mock.patch("zlib.crc32", side_effect=KeyboardInterrupt), \
                self.assertRaises(KeyboardInterrupt):
            gpt.save_model(small_gpt(spread=1.0).float(), "m")
        self.assert_loaded("m")

    @needs_transformers
    @torch.no_grad()
    def test_transformers_models_of_several_shapes_there_and_back(self):
        import transformers

        for vocab_size, block_size, n_layer, n_head, n_embd in (
                (97, 16, 1, 1, 8), (1000, 33, 2, 3, 48), (503, 128, 5, 2, 64), (61, 24, 3, 4, 32),
                (2048, 64, 4, 8, 128), (50257, 1024, 2, 12, 768)):
            torch.manual_seed(0)
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=vocab_size, n_positions=block_size, n_layer=n_layer, n_head=n_head,
                n_embd=n_embd, bos_token_id=0, eos_token_id=None)).eval()
            idx = torch.randint(vocab_size, (2, min(block_size, 64)))
            expected = theirs(idx, labels=idx)
            for name, options in (("one", {}), ("shards", {"max_shard_size": "20MB"})):
                theirs.save_pretrained(name, **options)
                ours = gpt.GPT.from_pretrained(name)
                logits, loss = ours(idx)[0], ours(idx[:, :-1], idx[:, 1:])[1]
                error = (logits - expected.logits).abs().max() / expected.logits.std()
                self.assertLess(error.item(), 1e-4)
                self.assertAlmostEqual(loss.item(), expected.loss.item(), delta=1e-5)
            gpt.save_model(ours, "back")
            back, info = transformers.GPT2LMHeadModel.from_pretrained(
                "back", output_loading_info=True)
            self.assertFalse(any(info.values()), info)
            error = (back.eval()(idx).logits - logits).abs().max() / logits.std()
            self.assertLess(error.item(), 1e-4)
            self.assertEqual(back.config.eos_token_id, None)
            tokens = theirs.generate(idx[:, :4], attention_mask=torch.ones_like(idx[:, :4]),
                                     max_new_tokens=12, do_sample=False, pad_token_id=0)
            identical(tokens, ours.generate(idx[:, :4], 12, do_sample=False))
            for folder in ("one", "shards", "back"):
                shutil.rmtree(folder)

    def test_a_model_is_downloaded_once_and_then_needs_no_network(self):
        files = ["added_tokens.json", "config.json", "merges.txt", "model.safetensors",
                 "vocab.json"]
        for name, repo, cache in (("gpt2-xl", "openai-community/gpt2-xl", "gpt2-xl"),
                                  ("me/gpt.2", "me/gpt.2", "me--gpt.2")):
            asked = serve_hub(self, self.model, repo)
            self.assert_loaded(name)
            self.assertEqual(sorted(asked), [f"{repo}/{file}" for file in files])
            replace_hub(self, "http://127.0.0.1:9")
            self.assert_loaded(name)
            self.assertEqual(len(gpt.load_tokenizer(name)), 257)
            self.assertEqual(sorted(os.listdir(f"cache/checkpoints/{cache}")), files[1:])

    def test_a_tokenizer_is_downloaded_without_weights_and_weights_with_all_shards(self):
        serve_hub(self, self.model)
        hub = Path("hub/openai-community/gpt2")
        (hub / "model.safetensors").unlink()
        write_shards(hub, self.tensors, "bin")
        folder = gpt.find_model("gpt2", weights=False)
        self.assertEqual(sorted(os.listdir(folder)), ["config.json", "merges.txt", "vocab.json"])
        self.assert_loaded("gpt2")
        self.assertEqual(len(os.listdir(folder)), 7)

    def test_two_downloads_at_once_do_not_disturb_each_other(self):
        both = threading.Barrier(2)
        serve_hub(self, self.model, wait=lambda: both.wait(60))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            folder, _ = pool.map(gpt.find_model, ["gpt2", "gpt2"])
        self.assert_loaded("gpt2")
        self.assertEqual(len(os.listdir(folder)), 4)

    def test_downloads_that_fail_leave_nothing_and_say_why(self):
        serve_hub(self, self.model, broken="model.safetensors")
        self.assert_not_loaded("it broke off 50 bytes before its end", "gpt2", ConnectionError)
        self.assertNotIn("model.safetensors", os.listdir("cache/checkpoints/gpt2"))
        self.assert_not_loaded("me/gpt is not on the hub", "me/gpt", FileNotFoundError)
        write_hub_folder("hub/me/bert", self.model, model_type="bert")
        self.assert_not_loaded("its model_type is 'bert'", "me/bert", ValueError)
        replace_hub(self, "http://127.0.0.1:9")
        self.assert_not_loaded("could not be downloaded .*: run once online", "gpt2-large",
                               ConnectionError)

    def test_ids_and_logits_published_for_the_public_weights(self):
        places = (DATA_DIR / "gpt2", Path(torch.hub.get_dir(), "checkpoints/gpt2"))
        folder = next((place for place in places if (place / "model.safetensors").exists()), None)
        if folder is None:
            self.skipTest("the public weights of GPT-2 are not at hand: they are downloaded by "
                          "`python gpt.py generate`")
        model, tokenizer = gpt.GPT.from_pretrained(folder), gpt.load_tokenizer(folder)
        ids = [1248, 5332, 287, 262, 7404, 286, 25370, 254, 368, 83, 6557, 81, 11]
        prompt = torch.tensor([tokenizer.encode("Ondřej Čertík was born in")])
        tokens = model.generate(prompt, len(ids), do_sample=False)
        self.assertEqual(tokens[0, prompt.size(1):].tolist(), ids)
        logits = model(torch.tensor([[15496]]))[0][0, 0, :4]
        assert_close(logits, torch.tensor([-35.236244, -35.326595, -38.975349, -39.390675]),
                     atol=1e-3, rtol=0)


# -- GPT: the command line of `generate` ------------------------------------------------------


class GenerateCommand(TemporaryFolder):
    CHARACTERS = "\n !'abcdefghijklmnopqrstuvwxyz"

    def setUp(self):
        super().setUp()
        self.save_run("run", len(self.CHARACTERS))
        write_hub_folder("hub", small_gpt(vocab_size=257), eos_token_id=256)
        own_files(folder="hub")

    def save_run(self, folder, vocab_size):
        gpt.save_model(small_gpt(vocab_size=vocab_size).float(), Path(folder))
        gpt.CharTokenizer(self.CHARACTERS).save(Path(folder))

    def generate(self, *argv, model="run", stdin=b""):
        """-> what `generate` wrote to standard output and to standard error"""
        with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))):
            status, out, err = run_main(gpt.main, "generate", "--model", model, "--device", "cpu",
                                        *argv)
        self.assertEqual(status, 0, err)
        return out, err

    def test_bad_values_are_answered_in_one_line(self):
        self.save_run("less", 5)
        shutil.copytree("hub", "half")
        os.remove("half/merges.txt")
        Path("runs").mkdir()
        for flags, saying in (
                ("--top-k -1", "--top-k: -1 is not between 0 and"),
                ("--top-p 1.1", "--top-p: 1.1 is not between 0 and 1"),
                ("--temperature -1", "--temperature: -1 is not between 0 and"),
                ("--num-samples 0", "--num-samples: 0 is not between 1 and"),
                ("--max-new-tokens -1", "--max-new-tokens: -1 is not between"),
                ("--greedy --top-k 3", "--greedy leaves nothing to"),
                ("--max-new 3", "unrecognized arguments: --max-new"),
                ("--model nowhere", "nowhere"), ("--model hub/config.json", "hub/config.json"),
                ("--model run --prompt aZ", "'Z'"), ("--model half", "merges.txt"),
                ("--model less", "they do not belong together"),
                *[("--device cuda", "--device cuda: this machine")] * (
                    not torch.cuda.is_available())):
            with self.subTest(flags):
                self.assert_refused(gpt, "generate", *flags.split(), saying=saying)
        self.assert_refused(gpt, "generate", "--stop", "", saying="--stop needs a text")
        self.assert_refused(gpt, saying="required: command")
        self.assert_refused(gpt, "write", saying="invalid choice: 'write'")

    def test_one_sample_of_each_kind_of_model_streams_token_by_token(self):
        for model in ("run", "hub"):
            with mock.patch("builtins.print") as written:
                self.generate("--prompt", "abc", "--max-new-tokens", 5, model=model)
            self.assertGreaterEqual(written.call_count, 8)
            out, err = self.generate("--prompt", "my text", "--max-new-tokens", 30, model=model)
            self.assertTrue(out.startswith("my text"))
            first, last = err.splitlines()
            self.assertRegex(first, rf"^{model}: [\d,]+ parameters on cpu in float32; tokens: 7 of")
            self.assertRegex(last, r"^\d+ tokens in [\d.]+ s: [\d.]+ tokens/s$")
        self.assertIn("tokens: 4 of the prompt", self.generate(
            "--prompt", "ab<|endoftext|>c", model="hub")[1])

    def test_a_seed_gives_the_same_text_again_and_another_seed_another(self):
        first, second = (self.generate("--seed", 1)[0] for _ in range(2))
        self.assertEqual(first, second)
        self.assertNotEqual(first, self.generate("--seed", 2)[0])

    def test_several_samples_are_made_as_one_batch(self):
        batches, hidden = [], gpt.GPT.hidden
        self.patch(gpt.GPT, "hidden", lambda self, idx, *rest: batches.append(
            len(idx)) or hidden(self, idx, *rest))
        out, err = self.generate("--num-samples", 3, "--prompt", "one", "--max-new-tokens", 12)
        self.assertEqual(batches, [3] * 12)
        samples = out.split("\n---\n")
        self.assertEqual(len(set(samples)), 3)
        self.assertTrue(all(sample.startswith("one") for sample in samples))
        self.assertRegex(err.splitlines()[-1], r"^36 tokens in")

    def test_flags_that_make_sampling_greedy_or_free(self):
        greedy = self.generate("--greedy")[0]
        for flag, value in (("--temperature", 0), ("--top-p", 0), ("--top-k", 1)):
            self.assertEqual(self.generate(flag, value)[0], greedy)
        free = self.generate("--top-k", 0)[0]
        self.assertNotEqual(free, greedy)
        self.assertEqual(self.generate("--top-k", 10**6, "--top-p", 1)[0], free)
        for dtype in ("bfloat16", "float16"):
            self.assertIn(f"on cpu in {dtype};", self.generate("--dtype", dtype)[1])

    def test_prompts_from_standard_input_empty_long_or_with_odd_characters(self):
        for stdin, prompt in ((b"two\nlines\n\n", "two\nlines\n"), (b"one\r\n", "one"),
                              ("é😀".encode(), "é😀")):
            out, _ = self.generate("--prompt", "-", "--max-new-tokens", 0, model="hub", stdin=stdin)
            self.assertEqual(out, prompt + "\n")
        with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"))):
            self.assert_refused(gpt, "generate", "--model", "hub", "--prompt", "-",
                                saying="'utf-8' codec can't decode byte 0xff")
        out = self.generate("--prompt", "a\0b\ud83dc", model="hub")[0]
        self.assertTrue(out.startswith("a\0b\ufffdc"))
        out = self.generate("--prompt", "long " * 20, "--max-new-tokens", 5)[0]
        self.assertEqual(len(out), 100 + 5 + 1)
        seen, hidden = [], gpt.GPT.hidden
        self.patch(gpt.GPT, "hidden", lambda self, idx, *rest: seen.append(
            idx.tolist()) or hidden(self, idx, *rest))
        self.generate("--max-new-tokens", 1, model="hub")
        self.generate("--max-new-tokens", 1)
        self.assertEqual(seen, [[[256]], [[0]]])  # what a new text starts with

    def test_a_text_ends_at_the_models_end_token_or_before_the_words_of_stop(self):
        script = iter(torch.tensor([97, 98, 256, 99]).view(4, 1, 1))
        with mock.patch.object(gpt, "next_token", lambda *_, **__: next(script)):
            out, err = self.generate("--prompt", "x", model="hub")
        self.assertEqual(out, "xab\n")
        self.assertRegex(err, "\n3 tokens in")
        flags = ["--prompt", "ab", "--max-new-tokens", 60]
        whole = self.generate(*flags)[0]
        for length in (1, 2, 5):
            stop = whole[20:20 + length]
            out = self.generate(*flags, "--stop", stop)[0]
            self.assertEqual(out, "ab" + whole[2:].split(stop)[0] + "\n")
        self.assertEqual("".join(gpt.up_to(["ab", "c", "ab", "d", "x"], "abd")), "abc")
        self.assertEqual("".join(gpt.up_to("aabaabaac", "aabaac")), "aab")


# -- GPT: text and training -------------------------------------------------------------------


def write_text(path, length=5000, characters="\n abcdefg"):
    """A text whose characters come in threes, which a model learns in a few steps."""
    words = ["".join(word) for word in itertools.product(characters, repeat=3)]
    text = "".join(random.Random(0).choices(words[::70], k=length // 3 + 1))[:length]
    Path(path).write_text(text, encoding="utf-8", newline="")
    return text


class Text(TemporaryFolder):
    def tokenize(self, tokenizer=None):
        """-> the length and characters of text.txt, and its tokens to train on and to validate"""
        length, digest, characters = gpt.scan_text(Path("text.txt"), None, True)
        tokenizer = tokenizer or gpt.CharTokenizer(characters)
        return length, characters, *gpt.tokenize(Path("text.txt"), length, digest, tokenizer,
                                                 Path("."), 4, check=True)

    def test_a_text_is_tokenized_once_for_each_tokenizer_and_split_by_characters(self):
        text = write_text("text.txt", 3333)
        own_files("a b", "e e")
        for tokenizer in (gpt.CharTokenizer("\n abcdefg"),
                          gpt.BPETokenizer("vocab.json", "merges.txt")):
            length, characters, train, val = self.tokenize(tokenizer)
            self.assertEqual((length, characters), (3333, "\n abcdefg"))
            self.assertEqual(train.tolist(), tokenizer.encode(text[:2999]))
            self.assertEqual(val.tolist(), tokenizer.encode(text[2999:]))
            with mock.patch.object(type(tokenizer), "encode_pieces", lambda *_: 1 / 0):
                self.assertEqual(self.tokenize(tokenizer)[2].tolist(), train.tolist())

    def test_damaged_token_files_are_noticed(self):
        write_text("text.txt", 3333)
        self.tokenize()
        file, = Path(".").glob("tokens-*.bin")
        whole = file.read_bytes()
        for damaged in (whole[:-2], whole[:1000] + bytes(100) + whole[1100:]):
            file.write_bytes(damaged)
            with self.assertRaisesRegex(common.UserError, "tokens-.*bin is damaged: delete it"):
                self.tokenize()

    def test_more_than_65536_different_tokens_do_not_wrap(self):
        everything = "".join(map(chr, [*range(32, 0xd800), *range(0x10000, 0x10000 + 20_000)]))
        Path("text.txt").write_text(everything, encoding="utf-8", newline="")
        train, val = self.tokenize()[2:]
        self.assertEqual([*train, *val], [*range(len(everything))])

    def test_tiny_shakespeare_is_downloaded_once_and_python_stands_in(self):
        asked = []
        server = serve(self, lambda handler, name: asked.append(name) or answer(handler, b"First"))
        self.patch(gpt, "SHAKESPEARE", f"{server}/input.txt")
        err = self.enterContext(contextlib.redirect_stderr(io.StringIO()))
        for _ in range(2):
            self.assertEqual(gpt.find_text("data").read_text(), "First")
        self.assertEqual(asked, ["input.txt"])
        self.patch(gpt, "SHAKESPEARE", "http://localhost:1/input.txt")
        path = gpt.find_text("elsewhere")
        self.assertIn("could not be downloaded", err.getvalue())
        self.assertEqual(path.name, "python-topics.txt")
        self.assertGreater(gpt.scan_text(path, None, False)[0], 100_000)


def evaluate(model, tokens, tokenizer, batch_size=4):
    num_bytes = np.array([tokenizer.num_bytes(id) for id in range(len(tokenizer))])
    return gpt.evaluate(model, tokens, num_bytes, batch_size, torch.float32)


class Optimization(unittest.TestCase):
    def test_orthogonalized_matrices_keep_their_singular_vectors(self):
        torch.manual_seed(0)
        for shape in ((20, 50), (50, 20), (30, 30)):
            matrix = torch.randn(shape)
            u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
            product = u.T @ common.orthogonalize(matrix.expand(2, *shape))[1] @ vt.T
            values = product.diag()  # of a diagonal matrix, if the vectors are the same
            self.assertLess((product - values.diag()).abs().max(), 1e-4)
            self.assertTrue(((0.6 < values) & (values < 1.3))[s > 0.1 * s.max()].all(), values)

    @unittest.skipUnless(hasattr(torch.optim, "Muon"), "this torch has no Muon")
    def test_muon_is_that_of_torch_and_takes_kernels_as_matrices(self):
        torch.manual_seed(0)
        theirs = nn.Parameter(torch.randn(40, 24))
        ours = nn.Parameter(theirs.detach().clone().view(40, 6, 2, 2))  # as in a convolution
        a = common.Muon([ours], lr=0.1, weight_decay=0.1)
        b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        before = theirs.detach().clone()
        for _ in range(3):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.flatten(1)
            a.step()
            b.step()
        moved = (theirs - before).norm()
        self.assertLess((ours.flatten(1) - theirs).norm(), 0.01 * moved)  # it has bfloat16

    def test_gpts_learning_rate_rises_and_falls_in_a_straight_line(self):
        args = argparse.Namespace(lr=1, min_lr=0.1, warmup=10, max_steps=110)
        rates = [gpt.learning_rate(step, args) for step in range(110)]
        assert_close(torch.tensor(rates)[[0, 9, 10, 60, 109]],
                     torch.tensor([0.1, 1, 1, 0.55, 0.109]), atol=1e-6, rtol=0)
        self.assertEqual(rates[10:], sorted(rates[10:], reverse=True))

    def test_validation_weighs_every_token_the_same_and_counts_bytes(self):
        torch.manual_seed(0)
        characters = "aé€😀\n"  # of 1, 2, 3, 4 and 1 bytes
        tokens = torch.randint(5, (50,)).numpy().astype(np.uint16)
        model = gpt.GPT(gpt.GPTConfig(5, 8, 1, 1, 4))  # six whole windows, and a token left out
        x = torch.from_numpy(tokens[:49].astype(np.int64))
        nats = model(x[:48].view(6, 8), x[1:].view(6, 8))[1].item()
        length = len("".join(characters[i] for i in tokens[1:49]).encode("utf-8"))
        for batch_size in (1, 4, 100):
            loss, bits = evaluate(model, tokens, gpt.CharTokenizer(characters), batch_size)
            self.assertAlmostEqual(loss, nats, places=5)
            self.assertAlmostEqual(bits, 48 * nats / length / math.log(2), places=5)
        self.assertTrue(model.training)
        evaluate(model, tokens[:5], gpt.CharTokenizer(characters))  # less than a window


class Training(TemporaryFolder):
    SMALL = ["--text", "text.txt", "--device", "cpu", "--n-layer", 2, "--n-embd", 32,
             "--block-size", 16]

    def setUp(self):
        super().setUp()
        self.quick = self.enterContext(contextlib.ExitStack())
        self.quick.enter_context(quickly(gpt))
        self.text = write_text("text.txt")

    def train(self, *argv, small=SMALL):
        """-> the folder of a run, and the lines that it printed"""
        status, out, err = run_main(gpt.main, "train", *small, *argv)
        self.assertEqual((status, err), (0, ""))
        return Path(out.splitlines()[-1].split(" -> ")[1]), out.splitlines()

    def test_a_run_learns_and_leaves_a_model_that_generates(self):
        run, lines = self.train("--max-steps", 60, "--eval-every", 25)
        self.assertEqual(run, Path("runs/gpt-text"))
        for part in ("GPT on text.txt, characters: ", "4,500 train, 500 val tokens, 9 different",
                     "60 steps of 8 x 16 tokens", "on cpu in float32", "-> runs/gpt-text"):
            self.assertIn(part, lines[0])
        rows = read_rows(run)
        self.assertEqual([row["step"] for row in rows], [0, 25, 50, 60])
        self.assertEqual([*rows[0]], ["epoch", "step", "seconds", "tokens_per_s", "train_loss",
                                      "val_loss", "val_bits_per_byte", "lr", "grad_norm"])
        self.assertLess(rows[-1]["val_loss"], 1.9)  # ln 9 is 2.2
        self.assertEqual(sorted(os.listdir(run)), [
            "args.json", "config.json", "last.pt", "metrics.jsonl", "model.safetensors",
            "test.json", "vocab.json"])
        test = json.loads((run / "test.json").read_text())
        self.assertEqual(test["val_loss"], min(row["val_loss"] for row in rows))
        status, out, _ = run_main(gpt.main, "generate", "--model", run, "--prompt", "abc",
                                  "--device", "cpu")
        self.assertEqual((status, out[:3], len(out)), (0, "abc", 204))

    def test_curves_and_samples_are_left_at_each_evaluation(self):
        self.quick.close()
        self.train("--max-steps", 2, "--eval-every", 1)
        samples = [path.read_text("utf-8") for path in sorted(Path("runs").rglob("*.txt"))]
        self.assertEqual([len(sample) for sample in samples], [200, 200, 200])
        self.assertGreater(Path("runs/gpt-text/loss.png").stat().st_size, 1000)

    @needs_transformers
    def test_transformers_reads_the_folder_of_a_run(self):
        import transformers

        Path("data/gpt2").mkdir(parents=True)
        own_files("a b", "e e", folder="data/gpt2")
        idx = torch.randint(9, (2, 16), generator=torch.Generator().manual_seed(0))
        for flags in ([], ["--tokenizer", "gpt2"]):
            run = self.train("--max-steps", 20, *flags)[0]
            theirs = transformers.GPT2LMHeadModel.from_pretrained(run).eval()
            ours = gpt.GPT.from_pretrained(run)
            self.assertEqual(ours.wte.weight.shape[0], len(gpt.load_tokenizer(run)))
            with torch.no_grad():
                assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
        # Rows that only training has: 257 + 2 tokens, rounded up to a multiple of 64
        self.assertEqual(torch.load(run / "last.pt")["model"]["wte.weight"].shape[0], 320)

    @needs_transformers
    def test_ten_steps_are_those_of_transformers_with_torchs_adamw(self):
        import transformers

        self.addCleanup(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        batches, losses = [], []
        load_model, forward = gpt.load_model, gpt.GPT.forward

        def remember(model, idx, targets):
            result = forward(model, idx, targets)
            if model.training:
                batches.append((idx, targets))
                losses.append(result[1].item())
            return result

        self.patch(gpt.GPT, "forward", remember)
        self.patch(gpt, "load_model", lambda *args: load_model(*args).double())
        write_hub_folder("hub", small_gpt(spread=0.1).float())
        run, _ = self.train("--init", "hub", "--tokenizer", "char", "--max-steps", 10, "--lr",
                            1e-3, "--min-lr", 1e-3, "--warmup", 0, small=self.SMALL[:4])
        theirs = transformers.GPT2LMHeadModel.from_pretrained("hub").double()
        groups = [{"params": [p for p in theirs.parameters() if p.dim() == dim],
                   "weight_decay": decay} for dim, decay in ((2, 0.1), (1, 0.0))]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        for (idx, targets), ours in zip(batches, losses, strict=True):
            logits = theirs(input_ids=idx).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            self.assertAlmostEqual(ours, loss.item(), delta=1e-8)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
        self.assertEqual(len(losses), 10)
        expected = theirs.transformer.state_dict()
        for name, weight in torch.load(run / "last.pt")["model"].items():
            other = expected[name].T if ".c_" in name and weight.dim() == 2 else expected[name]
            assert_close(weight, other[:len(weight)], rtol=0, atol=1e-8)

    def test_fine_tuning_starts_from_the_loss_of_its_model_and_keeps_its_tokenizer(self):
        write_hub_folder("hub", small_gpt(vocab_size=300, block_size=24).float())
        own_files("a b", folder="hub")
        first = self.train("--max-steps", 30)[0]
        for init in ("hub", first):
            model, tokenizer = gpt.GPT.from_pretrained(init), gpt.load_tokenizer(init)
            model.crop(16)
            val = np.array(tokenizer.encode(self.text[4500:]), np.uint16)
            own, _ = evaluate(model, val, tokenizer)
            run, lines = self.train(
                "--init", init, "--block-size", 16, "--max-steps", 60, "--lr", 3e-3, "--dropout",
                0.1, "--text", "text.txt", "--device", "cpu", small=[])
            self.assertIn(f"val {own:.4f}", "".join(lines))
            self.assertLess(read_rows(run)[-1]["val_loss"], own - 0.02)
            self.assertEqual(gpt.load_tokenizer(run).fingerprint, tokenizer.fingerprint)

    def test_each_step_and_each_seed_has_windows_of_its_own(self):
        seen, windows = [], gpt.windows
        self.patch(gpt, "windows", lambda tokens, starts, length: seen.append(
            (len(tokens), *starts)) or windows(tokens, starts, length))
        for seed in (1, 1, 2):
            self.train("--max-steps", 3, "--seed", seed)
        seen = [starts for length, *starts in seen if length == 4500]  # those in training
        self.assertEqual(seen[:3], seen[3:6])
        self.assertEqual((len(seen), len(set(map(tuple, seen)))), (9, 6))

    def test_windows_of_two_passes_cover_the_text(self):
        covered, windows = np.zeros(4500), gpt.windows

        def mark(tokens, starts, length):
            if len(tokens) == 4500:  # in training
                covered[starts[:, None] + np.arange(length - 1)] = 1
            return windows(tokens, starts, length)

        self.patch(gpt, "windows", mark)
        self.train("--max-steps", 2 * 4500 // (8 * 16))
        self.assertGreater(covered.mean(), 0.99)  # at random it would be 0.86

    def test_eval_tokens_validates_on_the_first_tokens_only(self):
        seen, original = [], gpt.evaluate
        self.patch(gpt, "evaluate", lambda model, tokens, *rest: seen.append(
            len(tokens)) or original(model, tokens, *rest))
        self.train("--max-steps", 1, "--eval-tokens", 48)
        self.assertEqual(seen, [49, 49])

    def test_texts_and_models_that_cannot_be_trained_are_refused_in_one_line(self):
        write_hub_folder("hub", small_gpt(vocab_size=257, block_size=24).float())
        write_hub_folder("few", small_gpt(vocab_size=5, block_size=24).float())
        own_files(folder="hub")
        for name, content in (("empty", b""), ("short", b"abcd" * 16), ("latin", b"caf\xe9" * 99),
                              ("new", b"xyz" * 999)):
            Path(name).write_bytes(content)
        self.train("--max-steps", 1, "--out-dir", "run")
        for flags, saying in (
                ("--text nowhere", "nowhere is not a file"), ("--text hub", "hub is not a file"),
                ("--text empty", "empty is empty"), ("--text short", "short is too short"),
                ("--text latin", "latin is not a UTF-8 text .*position 3"),
                ("--limit 20", "text.txt is too short"),
                (f"--block-size {4 * 10**9}", "there is not enough memory"),
                ("--n-embd 100 --n-head 3", "n_embd 100 is not a multiple of n_head 3"),
                ("--size gpt-tiny", "invalid choice: 'gpt-tiny'"),
                ("--batch-size 10 --grad-accum 4", "not a multiple of --grad-accum"),
                ("--dropout 2", "--dropout: 2 is not between 0 and 1"),
                ("--init nowhere", "nowhere"), ("--init hub --n-layer 2", "leave out --n-layer"),
                ("--init hub --block-size 25", "blocks of at most 24 tokens, not of 25"),
                ("--init hub --tokenizer char", "char does not fit --init hub"),
                ("--init few", "few.*vocab.json"),
                ("--init few --tokenizer char", "9 tokens and few 5: they do not"),
                ("--init run --text new", "never saw"),
                ("--resume run --text new", "new is not the text that"),
                ("--resume run --n-layer 3", "--n-layer 3 does")):
            with self.subTest(flags):
                self.assert_refused(gpt, "train", "--text", "text.txt", *flags.split(),
                                    "--device", "cpu", saying=saying)
        with mock.patch.dict(os.environ, WORLD_SIZE="3"):
            self.assert_refused(gpt, "train", *self.SMALL, "--batch-size", 8,
                                saying="--batch-size 8 is not a multiple of .* 3, the")


# -- What the scripts share -------------------------------------------------------------------


class Common(TemporaryFolder):
    def test_glyphs_are_the_same_every_time_and_of_all_digits(self):
        images, labels = DRAW_GLYPHS()
        self.assertEqual((images.shape, images.dtype), ((70_000, 1, 28, 28), torch.uint8))
        identical((images, labels), DRAW_GLYPHS.__wrapped__())
        self.assertGreater(torch.bincount(labels).min().item(), 6000)
        self.assertTrue(15 < images.float().mean().item() < 90)  # ink, and not too much of it

    def test_the_split_into_train_val_and_test_is_fixed_and_limit_takes_the_first(self):
        torch.manual_seed(1)
        whole = common.load_mnist("glyphs", "none", None, "cpu")
        images, _ = DRAW_GLYPHS()
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(42))
        identical(torch.cat([whole.train, whole.val]), images[order])
        identical(whole.test, images[60_000:])
        self.assertEqual(len(whole.val), 6000)
        few = common.load_mnist("glyphs", "none", 100, "cpu")
        identical(few.train, whole.train[:100])
        identical(few.val, whole.val[:10])
        identical(few.test_labels, whole.test_labels[:10])

    def new_folder(self, path):
        return common.new_run_folder(path, argparse.Namespace(seed=1))

    def test_a_run_never_writes_into_a_folder_that_holds_something(self):
        Path("runs/a").mkdir(parents=True)
        self.assertEqual(self.new_folder("runs/a"), Path("runs/a"))  # it was empty
        self.assertEqual(json.loads(Path("runs/a/args.json").read_text()), {"seed": 1})
        Path("runs/a-2").touch()
        self.assertEqual(self.new_folder("runs/a/"), Path("runs/a-3"))
        os.chdir("runs/a")
        self.assertEqual(self.new_folder("."), Path.cwd().with_name("a-4"))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            folders = [*pool.map(self.new_folder, ["a"] * 20)]
        self.assertEqual(len(set(folders)), 20)  # also where they start at once

    CHECKPOINT = {"model": {"w": torch.arange(1000.)}, "args": {"script": "vae.py"}}

    def test_a_checkpoint_comes_back_and_damage_is_noticed(self):
        path = Path("a.pt")
        common.save_checkpoint(path, self.CHECKPOINT)
        identical(common.load_checkpoint(path, "vae.py")["model"], self.CHECKPOINT["model"])
        self.assertEqual(os.listdir(), ["a.pt"])
        with self.assertRaisesRegex(common.UserError, "written by vae.py, not by gpt.py"):
            common.load_checkpoint(path, "gpt.py")
        content = path.read_bytes()
        start = content.index(torch.arange(1000.).numpy().tobytes())
        damaged = [b"", b"some text", b"PK\x03\x04" + b"\0" * 100]
        for position in range(start, start + 4000, 97):  # a bit of a weight
            damaged.append(bytearray(content))
            damaged[-1][position] ^= 1
        for foreign in ({"weights": 1}, [1], Path("a_path_needs_pickle")):
            torch.save(foreign, path)
            damaged.append(path.read_bytes())
        for content in damaged:
            path.write_bytes(content)
            with self.assertRaisesRegex(common.UserError, "a.pt is missing or damaged"):
                common.load_checkpoint(path, "vae.py")

    @unittest.skipIf(os.name == "nt", "needs a limit on the size of files")
    def test_a_full_disk_or_weights_that_are_not_finite_leave_the_checkpoint_before(self):
        import resource

        common.save_checkpoint(Path("a.pt"), self.CHECKPOINT)
        before = snapshot()
        with self.assertRaisesRegex(common.UserError, "no longer finite"):
            common.save_checkpoint(Path("a.pt"), {"model": {"w": torch.tensor([1, math.nan])}})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        with self.assertRaisesRegex(common.UserError, r"a.pt cannot be written \(File too"):
            common.save_checkpoint(Path("a.pt"), self.CHECKPOINT)
        self.assertEqual(snapshot(), before)

    def test_tiles_are_laid_row_by_row(self):
        images = torch.arange(6.).view(6, 1, 1, 1).expand(6, 1, 2, 2)
        grid = common.tile(images, columns=3)
        self.assertEqual(grid.shape, (5, 8))
        self.assertEqual(grid[::3, ::3].tolist(), [[0, 1, 2], [3, 4, 5]])

    def test_the_cpu_computes_in_float32_and_what_cannot_be_compiled_is_warned_of(self):
        self.assertEqual(common.pick_device("cpu", amp=True), (torch.device("cpu"), torch.float32))
        with contextlib.redirect_stderr(io.StringIO()) as err, \
                mock.patch.object(torch, "compile", side_effect=RuntimeError("no compiler\nhere")):
            self.assertFalse(gpt.can_compile("cpu"))
        self.assertEqual(err.getvalue(), "warning: --compile does not work here (no compiler); "
                         "going on without it\n")

    @unittest.skipUnless(torch.cuda.is_available(), "no GPU")
    def test_a_step_recorded_as_a_cuda_graph_computes_what_it_does_by_itself(self):
        results = []
        for record in (common.cuda_graph, lambda step: step):
            torch.manual_seed(0)
            weight = torch.randn(5, 5, device="cuda", requires_grad=True)
            lr = torch.zeros((), device="cuda")
            optimizer = common.Muon([weight], lr, weight_decay=0.1)

            def step(x, weight=weight, optimizer=optimizer):
                loss = (x @ weight + torch.randn_like(x)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            recorded, losses = record(step), []
            for i in range(12):  # two shapes, each recorded at its fourth call
                lr.fill_(0.1 / (i + 1))
                losses.append(recorded(torch.full((4 + i % 2, 5), 1.0 + i, device="cuda")).item())
            results.append(losses)
        np.testing.assert_allclose(*results, rtol=1e-5)

    def paste(self, path, names):
        """The definitions `names`, and those of the file that they use, run by themselves with
        nothing of the file but its imports of torch and the standard library -> their namespace"""
        definitions, body = {}, []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                definitions[node.name] = node
            elif isinstance(node, ast.Assign):
                definitions[node.targets[0].id] = node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if module.split(".")[0] in {"torch", *sys.stdlib_module_names}:
                    body.append(node)
        used, todo = set(), list(names)
        while todo:
            if (name := todo.pop()) in definitions.keys() - used:
                used.add(name)
                todo += [n.id for n in ast.walk(definitions[name]) if isinstance(n, ast.Name)]
        namespace = {}
        body += [node for name, node in definitions.items() if name in used]
        exec(compile(ast.Module(body, []), str(path), "exec"), namespace)
        return namespace

    def test_parts_run_when_pasted_with_torch_alone(self):
        x, idx = DRAW_GLYPHS()[0][:2], torch.zeros(5, 3, dtype=torch.int64)
        weight = nn.Parameter(torch.eye(3))
        for script, names, lines in (
                ("vae", "VAE log_likelihood",
                 "model = VAE(2, 4); sum(model(x >> 4)[:2]).backward(); model.sample(2);"
                 "log_likelihood(model, x >> 4, 3)"),
                ("aae", "AdversarialAE parzen_log_likelihood sliced_wasserstein",
                 "model = AdversarialAE(2, 'universal'); x = x / 255; recon, z = model(x);"
                 "model.autoencoder_loss(x, recon, z, 0.995)[0].backward();"
                 "model.discriminator_loss(z.detach())[0].backward();"
                 "parzen_log_likelihood(x, x, [0.2]); sliced_wasserstein(z, z, 10)"),
                ("gpt", "GPT GPTConfig CharTokenizer BPETokenizer",
                 "model = GPT(GPTConfig(61, 24, 2, 2, 16, fused=False));"
                 "model(idx, idx)[1].backward(); model.generate(idx, 3, top_p=0.9);"
                 "assert CharTokenizer('abc').encode('cab') == [2, 0, 1]"),
                ("common", "Muon", "weight.sum().backward(); Muon([weight], 0.1, 0.0).step()")):
            exec(lines, self.paste(HERE / f"{script}.py", names.split())
                 | {"x": x, "idx": idx, "weight": weight})

    def test_losses_are_in_float32_under_autocast_and_in_float64_for_such_a_model(self):
        x, idx = DRAW_GLYPHS()[0][:100], torch.randint(61, (5, 24))
        adversarial, floats = aae.AdversarialAE(posterior="gaussian"), aae.to_float(x)

        def losses(dtype):
            recon, z = adversarial(floats.to(dtype))
            return *adversarial.autoencoder_loss(floats, recon, z, 0.9), \
                adversarial.discriminator_loss(z)[0]

        language, bound = gpt.GPT(gpt.GPTConfig(61, 24, 2, 4, 32)), vae.VAE()
        for model, compute in ((bound, lambda dtype: bound(x >> 4)), (adversarial, losses),
                               (language, lambda dtype: language(idx, idx)[1:])):
            results = []
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(1)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    results.append(compute(torch.float32))
            assert_close(*results, rtol=0.02, atol=0)
            for loss in compute(model.double() and torch.float64):
                self.assertEqual(loss.dtype, torch.float64)
        for model in (bound, adversarial):
            self.assertEqual(model.half().sample(2).shape, (2, 1, 28, 28))


class Datasets(TemporaryFolder):
    """Finding, checking and downloading: against the real files, and a server on localhost."""

    def serve(self, respond, resources=None):
        """A server on localhost in the place of MNIST's"""
        import torchvision

        self.patch(torchvision.datasets.MNIST, "mirrors", [serve(self, respond) + "/"])
        if resources:
            self.patch(torchvision.datasets.MNIST, "resources", [
                (name, hashlib.md5(content).hexdigest()) for name, content in resources.items()])

    def packed(self):
        return {f"{name}.gz": gzip.compress((DATA_DIR / "MNIST/raw" / name).read_bytes(), 1)
                for name in common.RAW_FILES}

    @needs_mnist
    def test_damaged_image_files_are_an_error_and_never_a_reason_to_fall_back(self):
        shutil.copytree(DATA_DIR / "MNIST/raw", "data/MNIST/raw")
        path = Path("data/MNIST/raw/t10k-images-idx3-ubyte")
        content = path.read_bytes()
        for damaged in (content[:-1000], b"", content[:50_000] + bytes(10_000) + content[60_000:]):
            path.write_bytes(damaged)
            self.assert_refused(vae, "--epochs", 1, saying="a file in data/MNIST/raw is damaged: "
                                "delete this folder")
        path.write_bytes(content[:-1000])
        os.rename("data/MNIST", "data/FashionMNIST")
        self.assert_refused(vae, "--dataset", "fashion", saying="data/FashionMNIST/raw is damaged")

    @needs_mnist
    def test_a_download_is_whole_and_happens_once(self):
        packed, asked = self.packed(), []
        self.serve(lambda handler, name: asked.append(name) or answer(handler, packed[name]),
                   packed)
        with contextlib.redirect_stderr(io.StringIO()):
            first = common.load_mnist("auto", "new/data", None, "cpu")
        requests = len(asked)
        again = common.load_mnist("auto", "new/data", None, "cpu")
        self.assertEqual((len(asked), set(asked)), (requests, set(packed)))
        identical(first.train, again.train)
        self.assertEqual(os.listdir("new/data"), ["MNIST"])

    @needs_mnist
    def test_packed_files_that_are_there_are_unpacked_without_a_network(self):
        packed = self.packed()
        Path("data/MNIST/raw").mkdir(parents=True)
        for name, content in packed.items():
            Path("data/MNIST/raw", name).write_bytes(content)
        self.serve(lambda handler, name: handler.send_error(404), packed)
        data = common.load_mnist("mnist", "data", None, "cpu")
        self.assertEqual(data.test_labels[:5].tolist(), [7, 2, 1, 0, 4])

    def test_downloads_that_break_off_or_never_answer_leave_nothing_and_say_what_to_do(self):
        gone = threading.Event()
        self.patch(common, "TIMEOUT", 0.5)
        for respond in (lambda handler, name: answer(handler, bytes(1000), 10**6),
                        lambda handler, name: gone.wait(600)):
            self.serve(respond)
            self.assert_refused(vae, "--dataset", "mnist", saying="could not be downloaded .*: "
                                "run once online, or pass --dataset glyphs")
            gone.set()

    def test_without_network_and_data_the_glyphs_stand_in_and_say_so(self):
        import torchvision

        self.enterContext(quickly(vae))
        self.patch(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
        _, out, err = run_main(vae.main, "--z-dim", 2, "--epochs", 1, "--limit", 100)
        warning, = (line for line in err.splitlines() if line.startswith("warning"))
        self.assertIn("using the built-in glyphs", warning)
        resumed = run_main(vae.main, "--resume", "runs/vae-z2-glyphs")
        for output in (out, resumed[1]):
            self.assertTrue(output.startswith("VAE on glyphs"))
            self.assertEqual(output.splitlines()[-1], "VAE on glyphs, z 2 -> runs/vae-z2-glyphs")


# -- Runs of all three scripts ----------------------------------------------------------------

def run_apart(script, argv, kill_at=0, environment=None, dtype=torch.float32):
    """What a process does: run a script in this folder, and take its own life at the kill_at-th of
    its backward passes and writes, an instant that does not depend on how busy the machine is."""
    left = kill_at

    def dangerous(function):
        def wrapper(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper

    os.environ |= environment or {}
    tqdm.set_lock(threading.RLock())  # its own lock would leak in a process that is killed
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}{os.environ.get('RANK', 0)}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    torch.Tensor.backward = dangerous(torch.Tensor.backward)
    os.fsync, os.replace = dangerous(os.fsync), dangerous(os.replace)
    module = {"vae": vae, "aae": aae, "gpt": gpt}[script]
    with quickly(module):
        common.draw_glyphs = lambda: torch.load("glyphs.pt")
        module.main([str(word) for word in argv])


def start(script, argv, **how):
    process = PROCESSES.Process(target=run_apart, args=(script, argv), kwargs=how)
    process.start()
    return process


@contextlib.contextmanager
def computing_in(dtype):
    """Within the `with` block the scripts compute on the CPU as they do on a GPU with `dtype`."""
    with mock.patch.object(common, "pick_device", lambda *_, **__: (torch.device("cpu"), dtype)):
        yield


class Runs:
    """What each script does with its runs. A unit is what it saves after: an epoch, or 15 steps.

    What subclasses give: their module; argv of a quick run, steps, its backward passes per unit,
    and total, the flag for its length; half_argvs, of runs with 50 steps per unit, loss, the column
    by which they are compared, and scale, the scaler's first; rates, flags of learning rates;
    fixed, flags that --resume refuses; bad_values and overflows, flags and what is said of them;
    compiled(), functions that torch.compile can take whole, and arguments for them.
    """

    def setUp(self):
        super().setUp()
        self.quick = self.enterContext(contextlib.ExitStack())
        self.quick.enter_context(quickly(self.module))
        write_text("text.txt")
        self.command = ["train"] if self.module is gpt else []

    def length(self, units):
        return [self.total, units * (self.steps if self.module is gpt else 1)]

    def call(self, *argv):
        return run_main(self.module.main, *self.command, *argv)

    def succeed(self, *argv):
        """-> what the script printed, which ended as it should"""
        status, out, err = self.call(*argv)
        self.assertEqual((status, err), (0, ""))
        return out

    def train(self, units, *argv):
        return self.succeed(*self.argv, *self.length(units), *argv)

    def resume(self, run, *argv):
        return self.succeed("--resume", run, *argv)

    def stop(self, units, *argv):
        """Ctrl-C right after last.pt was saved for the units-th time. -> the last line"""
        save, rows = common.save_checkpoint, units + (self.module is gpt)

        def save_and_stop(path, state):
            save(path, state)
            if path.name == "last.pt" and len(state["rows"]) == rows:
                raise KeyboardInterrupt

        with mock.patch.object(common, "save_checkpoint", save_and_stop):
            status, _, err = self.call(*argv)
        self.assertEqual(status, 130)
        return err.splitlines()[-1]

    def content(self, run):
        """-> the tensors of last.pt and of the best model; all figures except times"""
        state = torch.load(Path(run, "last.pt"))
        figures = [*state["rows"], *read_rows(run), json.loads(Path(run, "test.json").read_text())]
        for row in figures:
            for name in ("seconds", "images_per_s", "tokens_per_s"):
                row.pop(name, None)
        best = [torch.load(path)["model"] for path in Path(run).glob("best.pt")]
        best += [gpt.load_model(run).state_dict()] if self.module is gpt else []
        return {name: state[name] for name in state.keys() - {"rows", "args", "text"}} | {
            "best": best}, figures

    def assert_the_same_run(self, first, second):
        (a, figures), (b, other_figures) = self.content(first), self.content(second)
        identical(a, b)
        self.assertEqual(figures, other_figures)

    @needs_processes
    def test_killed_five_times_and_resumed_ends_bit_for_bit_the_same(self):
        torch.save(DRAW_GLYPHS(), "glyphs.pt")
        for run in ("whole", "killed"):
            self.train(2, "--out-dir", run)
        self.resume("whole", *self.length(5))
        # Counted are two calls for each file that is written, and the backward passes. A start, a
        # step, a step of the next unit, a step, and among a unit's last writes:
        for instant in (3, 12, self.steps + 15, 9, self.steps + 9):
            extension = self.length(5) if instant == 3 else []
            process = start(self.module.__name__, [
                *self.command, "--resume", "killed", *extension], kill_at=instant)
            process.join()
            self.assertEqual(process.exitcode, -signal.SIGKILL, Path("stderr0").read_text())
        self.resume("killed")
        self.assert_the_same_run("whole", "killed")

    def test_stopped_by_ctrl_c_and_resumed_ends_the_same(self):
        self.train(2, "--out-dir", "whole")
        line = self.stop(1, *self.argv, *self.length(2), "--out-dir", "a")
        self.assertEqual(line, f"{self.module.__name__}.py: stopped; to go on with a training "
                         "from its last checkpoint, pass --resume and its folder")
        before = snapshot("a")
        self.resume("a", *self.length(1))  # only looks at it
        self.assertEqual(snapshot("a"), before)
        self.resume("a")
        self.assert_the_same_run("whole", "a")

    def test_a_finished_run_resumed_changes_nothing_and_can_be_extended(self):
        self.train(2, "--out-dir", "a")
        before, rows = snapshot("a"), read_rows("a")
        for argv in ([], self.length(1)):
            out = self.resume("a", *argv)
            self.assertEqual(snapshot("a"), before)
            self.assertIn(f"{self.length(2)[1]} of them done", out)
            self.assertRegex(out, "(?m)^(test|best): ")
        out = self.resume("a", *self.length(4))
        self.assertIn("the learning rate rises again", out)
        self.assertEqual(read_rows("a")[:len(rows)], rows)
        self.assertEqual(len(read_rows("a")), len(rows) + 2)
        key, total = self.total[2:].replace("-", "_"), self.length(4)[1]
        self.assertEqual(json.loads(Path("a/args.json").read_text())[key], total)
        self.assertEqual(torch.load("a/last.pt")["args"][key], total)

    def test_what_cannot_be_resumed_is_refused(self):
        self.train(1, "--out-dir", "a")
        shutil.copytree("a", "half")
        Path("half/last.pt").write_bytes(b"half a check")
        shutil.copytree("a", "other")
        common.save_checkpoint(Path("other/last.pt"), {"model": {}, "args": {"script": "x.py"}})
        for run, saying in (("nowhere", "nowhere/last.pt is missing"),
                            ("half", "half/last.pt is missing or damaged"),
                            ("a/last.pt", "last.pt/last.pt is missing"),
                            ("other", "was written by x.py, not by")):
            self.assert_refused(self.module, *self.command, "--resume", run, saying=saying)
        for flag, value in (("--seed", 1), ("--batch-size", 10), ("--limit", 100),
                            ("--out-dir", "b"), *self.fixed):
            self.assert_refused(self.module, *self.command, "--resume", "a", *self.length(2),
                                flag, value, saying=flag)

    def test_bad_values_are_answered_in_one_line(self):
        Path("a_file").touch()
        for flags, saying in (
                ("--seed -1", "--seed: -1 is not between 0 and"),
                (f"--seed {10**30}", f"--seed: {10**30} is not between 0 and"),
                ("--limit 0", "--limit: 0 is not between 1 and"),
                ("--batch-size 0", "--batch-size: 0 is not between 1 and"),
                (f"{self.total} 0", f"{self.total}: 0 is not between 1 and"),
                *((f"{rate} {value}", f"{rate}: {value} is not between 0 and")
                  for rate in self.rates for value in ("-1", "nan", "inf")),
                ("--data 2", "unrecognized arguments: --data 2"),  # no abbreviations
                ("--out-dir a_file/run", "a_file"),
                *[("--device cuda", "--device cuda: this machine")] * (
                    not torch.cuda.is_available()), *self.bad_values):
            with self.subTest(flags):
                self.assert_refused(self.module, *self.command, *self.argv, *flags.split(),
                                    saying=saying)

    def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(self):
        for i, (flags, saying) in enumerate(self.overflows):
            status, _, err = self.call(*self.argv, *flags.split(), "--out-dir", f"run{i}")
            self.assertEqual(status, 2)
            self.assertRegex(err.splitlines()[-1], f"^{self.module.__name__}.py: error: {saying}")
            saved = Path(f"run{i}/last.pt")
            self.assertEqual(saved.exists(), self.module is gpt)  # which saves the untrained model
            self.assertLessEqual(saved.exists() and len(torch.load(saved)["rows"]), 1)

    def test_float16_and_bfloat16_learn_as_float32_does_and_the_scaler_is_resumed(self):
        for i, argv in enumerate(self.half_argvs):
            losses = {}
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                with computing_in(dtype):
                    self.succeed(*argv, "--out-dir", f"{i}-{dtype}")
                state = torch.load(f"{i}-{dtype}/last.pt")
                losses[dtype] = state["rows"][-1][self.loss]
                self.assertTrue(all(w.dtype == torch.float32 for w in state["model"].values()))
                self.assertEqual(bool(state["scaler"]), dtype == torch.float16)
            for dtype in (torch.bfloat16, torch.float16):
                self.assertLess(abs(losses[dtype] / losses[torch.float32] - 1), 0.03, dtype)
            # The scale halves with each step that overflows and is skipped.
            self.assertGreaterEqual(state["scaler"]["scale"], self.scale / 4)
        with computing_in(torch.float16):
            self.stop(1, *argv, "--out-dir", "b")
            self.resume("b")
        self.assert_the_same_run(f"{i}-torch.float16", "b")

    def test_compiled_graphs_have_no_break(self):
        for function, arguments in self.compiled():
            explanation = torch._dynamo.explain(function)(*arguments)
            self.assertEqual(explanation.graph_break_count, 0, explanation.break_reasons)
            torch._dynamo.reset()

    @needs_processes
    def test_a_reader_that_goes_away_ends_the_script_quietly(self):
        process = subprocess.Popen(
            [sys.executable, HERE / f"{self.module.__name__}.py", *self.command,
             *map(str, self.argv), *map(str, self.length(1))], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        process.stdout.close()
        self.assertNotIn(b"Error", process.stderr.read())
        process.stderr.close()
        self.assertEqual(process.wait(), 1)


class ImageRuns(Runs):
    """What vae.py and aae.py do with their runs"""

    total, steps = "--epochs", 15
    argv = ["--dataset", "glyphs", "--limit", 300, "--batch-size", 20, "--device", "cpu"]
    half = ["--dataset", "glyphs", "--limit", 400, "--batch-size", 8, "--epochs", 2]
    image_values = [
        ("--z-dim 0", "--z-dim: 0 is not between 1 and"),
        ("--z-dim two", "--z-dim: invalid int value: 'two'"),
        ("--dataset imagenet", "invalid choice: 'imagenet'"),
        ("--dataset mnist --data-dir a_file", "a_file is not a folder")]

    def test_a_run_leaves_its_files_and_shows_the_same_again(self):
        self.quick.close()  # with pictures
        for flags, name, pictures in self.pictures:
            lines = self.train(2, *flags.split()).splitlines()
            run = Path(f"runs/{name}-glyphs")
            self.assertEqual(lines[-1].split(" -> ")[1], str(run))
            self.assertEqual(sorted(os.listdir(run)), sorted(
                f"args.json metrics.jsonl last.pt test.json {pictures}".split()))
            self.assertEqual([(row["epoch"], row["step"]) for row in read_rows(run)],
                             [(1, 15), (2, 30)])
            before = snapshot(run)
            again = self.resume(run).splitlines()
            end = [line.startswith("test") for line in lines].index(True)
            self.assertEqual(again[-len(lines[end:]):], lines[end:])
            self.assertEqual(snapshot(run), before)

    def test_a_handful_of_images_gives_figures_of_all_kinds(self):
        self.train(1, "--limit", 3, "--out-dir", "a")
        json.loads(Path("a/test.json").read_text(), parse_constant=self.fail)  # no nan

    def test_learning_rates_rise_in_the_first_tenth_and_fall_to_zero(self):
        rates = {}  # of each optimizer, in the order of their steps
        hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.setdefault(
            id(optimizer), []).append(float(optimizer.param_groups[-1]["lr"])))
        self.addCleanup(hook.remove)
        flags = [word for i, rate in enumerate(self.rates) for word in (rate, 0.01 * (i + 1))]
        self.train(1, "--limit", 195, "--batch-size", 10, *flags)
        schedule = [min((step + 0.5) / 2, (19.5 - step) / 18) for step in range(20)]
        for peak, found in zip(self.peaks, rates.values(), strict=True):
            np.testing.assert_allclose(found, np.multiply(peak, schedule), rtol=1e-6)

    def test_each_epoch_and_each_seed_has_an_order_of_its_own(self):
        orders, randperm = [], torch.randperm
        with mock.patch.object(torch, "randperm", lambda n, **options: orders.append(
                tuple(randperm(n, **options).tolist())) or torch.tensor(orders[-1])):
            for seed in (1, 1, 2):
                self.train(2, "--seed", seed)
        orders = [order for order in orders if len(order) == 300]  # without the split's
        self.assertEqual(orders[:2], orders[2:4])
        self.assertEqual(len(set(orders)), 4)

    def test_a_run_killed_during_its_test_is_tested_when_resumed(self):
        self.train(1, "--out-dir", "whole")
        with mock.patch.object(self.module, "test_figures", side_effect=KeyboardInterrupt):
            self.call(*self.argv, "--epochs", 1, "--out-dir", "b")
        Path("b/metrics.jsonl").unlink()  # as if killed a little earlier
        self.resume("b")
        self.assert_the_same_run("whole", "b")

    def test_a_run_without_streams_or_in_another_thread_or_a_folder_with_accents(self):
        ascii_only, ended = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), []
        argv = [*map(str, self.argv), "--epochs", "1", "--out-dir", "\u00e9t\u00e9"]
        with mock.patch.multiple(sys, stdout=ascii_only, stderr=None):
            thread = threading.Thread(target=lambda: ended.append(self.module.main(argv)))
            thread.start()
            thread.join()
        self.assertEqual(ended, [None])
        ascii_only.flush()
        self.assertIn(b" -> ?t?", ascii_only.buffer.getvalue())


class VAERuns(ImageRuns, TemporaryFolder):
    module, rates, loss, scale = vae, ["--lr"], "train_bpd", 2**6
    peaks = [0.01, 0.01]  # of Muon and AdamW
    argv = [*ImageRuns.argv, "--num-filters", 4]
    half_argvs = [[*ImageRuns.half, "--num-filters", 4]]
    bad_values, fixed = ImageRuns.image_values, [("--z-dim", 3), ("--dataset", "kmnist")]
    # Of 3 steps, noticed when the run is saved, and of 75, noticed when the bar reads the loss
    overflows = [("--epochs 1 --lr 4e9 --batch-size 100", "the weights are no longer finite"),
                 ("--epochs 1 --lr 4e9 --batch-size 4", "the loss is not finite at step 50")]
    pictures = [(f"--z-dim {z_dim}", f"vae-z{z_dim}", f"best.pt bpd.png reconstructions.png {own} "
                 "samples_epoch_000.png samples_epoch_001.png samples_epoch_002.png")
                for z_dim, own in ((2, "manifold.png latents.png"), (3, "kl.png"))]

    def compiled(self):
        return [(vae.VAE(), [vae.to_4_bits(DRAW_GLYPHS()[0][:4])])]

    def test_the_best_model_by_validation_is_tested_and_asked_for_at_once(self):
        losses = iter([[9, 9], [3, 3], [1, 1], [2, 2], [5, 5], [6, 6]])  # untrained, 3 epochs, test
        with mock.patch.object(vae, "evaluate", lambda *_: next(losses)):
            out = self.train(3, "--out-dir", "a")
        self.assertIn("the best model by validation is that of epoch 2 of 3", out)
        self.assertEqual(torch.load("a/best.pt")["epoch"], 2)
        Path("a/best.pt").unlink()
        self.assert_refused(vae, "--resume", "a", "--epochs", 4, saying="best.pt is missing")


class AAERuns(ImageRuns, TemporaryFolder):
    module, rates, loss, scale = aae, ["--ae-lr", "--d-lr"], "train_mse", 2**16
    peaks = [0.01, 0.01, 0.02]  # of Muon and AdamW, and of the discriminator's Adam
    steps = 30  # two backward passes for each batch
    half_argvs = [ImageRuns.half]
    bad_values = [*ImageRuns.image_values,
                  ("--lam 1.01", "--lam: 1.01 is not between 0 and 1"),
                  ("--lam nan", "--lam: nan is not between 0 and 1"),
                  ("--posterior normal", "invalid choice: 'normal'")]
    fixed = [("--z-dim", 3), ("--lam", 0.5), ("--posterior", "universal")]
    overflows = [("--epochs 1 --ae-lr 4e9 --batch-size 100", "the weights are no longer finite"),
                 ("--epochs 1 --ae-lr 4e9 --batch-size 4", "a loss is not finite at step 50")]
    pictures = [(flags, name, f"mse.png codes.png {own} " + " ".join(
        f"{kind}_epoch_00{epoch}.png" for kind in ("samples", "reconstructions")
        for epoch in range(3))) for flags, name, own in (
            ("--z-dim 3 --posterior universal", "aae-z3-lam0.995-universal", "adversary.png"),
            ("--lam 1 --z-dim 2", "aae-z2-lam1", "manifold.png"))]

    def compiled(self):
        model, x = AdversarialAE(posterior="gaussian"), aae.to_float(DRAW_GLYPHS()[0][:4])
        recon, z = (t.detach() for t in model(x))
        return [(model, [x]), (model.autoencoder_loss, [x, recon, z, 0.995]),
                (model.discriminator_loss, [z])]

    def test_a_discriminator_loss_that_is_not_finite_stops_the_run(self):
        broken = torch.tensor(math.nan, requires_grad=True), torch.tensor(0.5)
        with mock.patch.object(AdversarialAE, "discriminator_loss", lambda *_: broken):
            status, _, err = self.call(*self.argv, "--batch-size", 4)
        self.assertEqual(status, 2)
        self.assertIn("a loss is not finite at step 50", err)

    def test_codes_come_to_the_prior_where_they_are_asked_to_and_only_there(self):
        for lam, low, high in ((0.995, 0, 3), (1, 4, 1000)):
            self.train(4, "--limit", 2000, "--ae-lr", 1e-2, "--d-lr", 1e-3, "--lam", lam,
                       "--out-dir", f"lam{lam}")
            test = json.loads(Path(f"lam{lam}/test.json").read_text())
            self.assertLess(test["test_mse"], 0.18)  # 0.22: the mean of all images
            self.assertTrue(low < test["test_sliced_wasserstein"] < high, test)

    def test_each_phase_moves_its_own_networks_alone(self):
        torch.manual_seed(42)
        start = aae.AdversarialAE().state_dict()
        for flags, expected in (("", {"encoder", "decoder", "discriminator"}),
                                ("--d-lr 0", {"encoder", "decoder"}),
                                ("--ae-lr 0", {"discriminator"}),
                                ("--lam 1", {"encoder", "decoder"})):
            self.train(1, *flags.split(), "--out-dir", "a")
            last = torch.load("a/last.pt")["model"]
            moved = {name.split(".")[0] for name in start
                     if (start[name] - last[name]).abs().max() > 1e-20}
            self.assertEqual(moved, expected, flags)
            shutil.rmtree("a")


class GPTRuns(Runs, TemporaryFolder):
    module, rates, loss, scale = gpt, ["--lr"], "train_loss", 2**16
    total, steps = "--max-steps", 15
    argv = ["--text", "text.txt", "--dropout", 0.2, "--n-layer", 2, "--n-embd", 32, "--block-size",
            16, "--eval-every", 15, "--device", "cpu"]
    half = [*argv, "--eval-every", 50, "--max-steps", 100, "--optimizer"]
    half_argvs = [[*half, "muon"], [*half, "adamw"]]
    bad_values, fixed = [], [("--n-layer", 3), ("--dropout", 0), ("--eval-tokens", 48)]
    overflows = [(f"--max-steps {steps} --eval-every 60 --optimizer adamw --lr 4e9",
                  f"the loss is not finite at step {found}") for steps, found in (
                      (60, 50), (20, 20))]

    def compiled(self):
        idx = torch.randint(61, (4, 16))
        return [(gpt.GPT(gpt.GPTConfig(61, 16, 2, 4, 32)), [idx, idx])]


@needs_processes
class TwoProcesses(TemporaryFolder):
    """gpt.py in two processes, as torchrun starts them, beside one"""

    argv = ["train", *GPTRuns.argv, "--batch-size", 8, "--dropout", 0, "--max-steps", 45]

    def setUp(self):
        super().setUp()
        write_text("text.txt")

    def run_in(self, size, *argv, kills=(0, 0), dtype=torch.float32):
        """-> the exit codes of `size` processes; each takes its own life at its instant of `kills`
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [start("gpt", argv, kill_at=kills[rank], dtype=dtype, environment={
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(size)]
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    def test_two_processes_train_the_model_of_one_and_resume_as_one(self):
        for size in (1, 2):
            self.assertEqual(self.run_in(size, *self.argv, "--grad-accum", 2, "--out-dir",
                                         f"run{size}", dtype=torch.float64), [0] * size)
        killed = self.run_in(2, *self.argv, "--out-dir", "killed", kills=(40, 40),
                             dtype=torch.float64)
        self.assertIn(-signal.SIGKILL, killed)
        self.assertEqual(self.run_in(1, "train", "--resume", "killed", dtype=torch.float64), [0])
        one = torch.load("run1/last.pt")
        self.assertLess(one["rows"][-1]["val_loss"], one["rows"][0]["val_loss"] - 0.1)
        for run in ("run2", "killed"):
            other = torch.load(f"{run}/last.pt")
            assert_close(other["model"], one["model"], rtol=1e-9, atol=1e-9)
            for a, b in zip(one["rows"], other["rows"], strict=True):
                self.assertAlmostEqual(a["val_loss"], b["val_loss"], places=9)

    def test_a_process_that_dies_takes_the_others_down(self):
        statuses = self.run_in(2, *self.argv, "--max-steps", 10**6, kills=(0, 40))
        self.assertEqual(statuses[1], -signal.SIGKILL)
        self.assertGreater(statuses[0], 0)

    def test_the_backends_serve_tensors_on_both_devices(self):
        from torch.distributed.distributed_c10d import BackendConfig

        source = (HERE / "gpt.py").read_text(encoding="utf-8")
        name = re.search(r'init_process_group\("([^"]+)" if device.type == "cuda"', source)[1]
        backends = BackendConfig(torch.distributed.Backend(name)).get_device_backend_map()
        self.assertEqual((backends["cpu"], backends["cuda"]), ("gloo", "nccl"))


class Readme(TemporaryFolder):
    TEXT = (HERE / "README.md").read_text(encoding="utf-8")

    def test_every_flag_in_the_readme_is_in_the_help(self):
        commands = re.findall(r"(vae|aae|gpt)\.py([^\n`|&]*)", self.TEXT)
        self.assertGreater(len(commands), 3)
        for script, rest in commands:
            command = rest.split()[:1] if script == "gpt" else []
            if flags := re.findall(r"--[a-z-]+", rest):
                main = {"vae": vae, "aae": aae, "gpt": gpt}[script].main
                self.assertLessEqual(set(flags), set(run_main(main, *command, "--help")[1].split()))

    def test_the_lines_of_python_run(self):
        blocks = re.findall(r"```python\n(.*?)```", self.TEXT, re.S)
        self.assertGreater(len(blocks), 1)
        for module, folder in ((vae, "runs/vae-z20"), (aae, "runs/aae-z8-lam0.995")):
            with mock.patch.multiple(module, draw_pictures=mock.DEFAULT, draw_curves=mock.DEFAULT):
                run_main(module.main, *ImageRuns.argv, "--epochs", 1, "--out-dir", folder)
        serve_hub(self, small_gpt(vocab_size=257, block_size=99).float())
        gpt.save_model(small_gpt(), "runs/gpt-tinyshakespeare")
        for block in blocks:
            if "transformers" not in block or find_spec("transformers"):
                with contextlib.redirect_stderr(io.StringIO()):
                    exec(block, {})

    def test_the_pictures_are_there_and_small(self):
        pictures = re.findall(r"figures/[\w.-]+", self.TEXT)
        self.assertGreater(len(pictures), 1)
        for picture in pictures:
            self.assertLess((HERE / picture).stat().st_size, 300_000, picture)


# -- The benchmark ----------------------------------------------------------------------------


def in_turn(title, ours, theirs, runs=5):
    """Call two functions in turn, which return a speed each. Print medians and their ratio."""
    pairs = [(ours(), theirs()) for _ in range(runs)]
    a, b = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
    ratios = sorted(x / y for x, y in pairs)
    print(f"{title}: {a:,.1f} beside {b:,.1f}; ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def per_second(number, work, *arguments):
    start = time.perf_counter()
    work(*arguments)
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
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(number)),
                                         64 if script == "vae.py" else 32, shuffle=True)
    discriminator = getattr(model, "discriminator", nn.Linear(1, 1))
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4)
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters()
                                  if not name.startswith("discriminator")], lr=1e-3)

    def epoch():
        for x, _ in loader:
            if script == "vae.py":
                loss = sum(model((x * 16).clamp(max=15).long())[:2])
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
    """transformers' model in the size of `gpt.py train` on a CPU, trained by torch. -> tokens/s"""
    import transformers

    recipe = gpt.RECIPES["cpu"]
    T, B = recipe["block_size"], recipe["batch_size"]
    tokenizer = gpt.CharTokenizer("".join(sorted(set(text))))
    tokens = torch.tensor(tokenizer.encode(text))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=T, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
        **{name: recipe[name] for name in ("n_embd", "n_layer", "n_head")}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def train():
        for _ in range(steps):
            x = tokens[torch.randint(len(tokens) - T, (B, 1)) + torch.arange(T)]
            model(input_ids=x, labels=x).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return per_second(steps * B * T, train)


def bench(data_dir):
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of runs in turn, "
          "and the ratio with its range", flush=True)
    for script in ("vae.py", "aae.py"):
        in_turn(f"training, images/s: {script} beside a DataLoader and Adam",
                lambda script=script: script_speed(
                    "images_per_s", script, "--data-dir", data_dir, "--limit", 6400, "--epochs", 1),
                lambda script=script: ordinary_images(script, data_dir, 6400))
    text, files = Path(data_dir, "tinyshakespeare.txt"), [
        Path(data_dir, "gpt2", name) for name in ("vocab.json", "merges.txt")]
    if find_spec("transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        few = text.read_text(encoding="utf-8")[:100_000]
        in_turn("training, tokens/s: gpt.py (AdamW) beside transformers", lambda: script_speed(
            "tokens_per_s", "gpt.py", "train", "--text", text, "--limit", 100_000, "--max-steps",
            100, "--optimizer", "adamw"), lambda: transformers_training(few, 100))
        ours = gpt.GPT(gpt.GPTConfig(50257, 1024, *gpt.SIZES["gpt2"])).eval()
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
        idx = torch.randint(50257, (1, 32))
        in_turn("generation with GPT-2's 124M, tokens/s: gpt.py beside transformers",
                lambda: per_second(200, lambda: ours.generate(idx, 200, do_sample=False)),
                lambda: per_second(200, lambda: theirs.generate(
                    idx, attention_mask=torch.ones_like(idx), min_new_tokens=200,
                    max_new_tokens=200, do_sample=False, pad_token_id=0)))
    if find_spec("tiktoken") and files[0].is_file():
        content = text.read_text(encoding="utf-8")
        megabytes, oracle = len(content.encode()) / 1e6, tiktoken_gpt2(*files)
        in_turn("encoding tiny Shakespeare, MB/s: gpt.py with a new tokenizer beside tiktoken",
                lambda: per_second(megabytes, gpt.BPETokenizer(*files).encode, content),
                lambda: per_second(megabytes, oracle.encode_ordinary, content))


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
