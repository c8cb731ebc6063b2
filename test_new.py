"""Every test, and the benchmark.

    python test_all.py             all tests, without a network
    python test_all.py -k resume   those with "resume" in their name
    python test_all.py --bench     speed, beside the ordinary way of doing the same work

DATA_DIR names a folder with the real MNIST (MNIST/raw/...) and GPT-2's tokenizer (gpt2/vocab.json
and merges.txt). Tests that miss these, transformers or tiktoken are skipped, and say so.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.testing import assert_close
from tqdm import tqdm

import aae
import common
import vae

HERE = Path(__file__).resolve().parent
DATA_DIR = Path(os.environ.get("DATA_DIR", "not given")).absolute()
needs_mnist = unittest.skipUnless((DATA_DIR / "MNIST/raw").is_dir(), "DATA_DIR has no MNIST")
needs_processes = unittest.skipUnless(hasattr(os, "fork"), "starts processes as POSIX systems do")
needs_gpu = unittest.skipUnless(torch.cuda.is_available(), "no GPU")
render_glyphs = functools.cache(common.render_glyphs)  # tests render them once
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


def snapshot(folder="."):
    """Every file below `folder` with its content's hash"""
    return {path: hashlib.md5(path.read_bytes()).hexdigest()
            for path in Path(folder).rglob("*") if path.is_file()}


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
    """Each test starts in an empty folder of its own."""

    def setUp(self):
        self.addCleanup(os.chdir, os.getcwd())
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        os.chdir(folder.name)
        self.patch(common, "render_glyphs", render_glyphs)

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
        before = snapshot()
        status, out, err = run_script(script, *argv)
        self.assertEqual((status, out), (2, ""), argv)
        self.assertIn(naming, err.splitlines()[-1])
        self.assertNotIn("Traceback", err)
        self.assertEqual(snapshot(), before)


# -- The variational autoencoder --------------------------------------------------------------


class VAE(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """A small model that has seen a few thousand glyphs"""
        torch.manual_seed(0)
        images = vae.to_4_bits(render_glyphs()[0])
        cls.model, cls.images = vae.VAE(z_dim=20, num_filters=8), images[60_000:]
        optimizer = torch.optim.Adam(cls.model.parameters(), lr=5e-3)
        for x in images[:60_000].split(64)[:200]:
            sum(cls.model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def test_pixels_become_4_bits_by_the_formula_of_the_practical(self):
        x = torch.arange(256, dtype=torch.uint8)
        formula = (x.double() / 255 * 16).floor().clamp(max=15)
        identical(vae.to_4_bits(x), formula.to(torch.uint8))

    def test_a_model_of_zeros_needs_exactly_4_bits_a_pixel(self):
        model = vae.VAE()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        rec, kl = model(self.images[:64])
        self.assertEqual(kl.item(), 0)
        self.assertAlmostEqual(vae.elbo_to_bpd(rec, self.images.shape).item(), 4, delta=1e-6)

    def test_training_beats_the_frequencies_of_pixel_values(self):
        frequency = torch.bincount(self.images.flatten().long(), minlength=16) / self.images.numel()
        entropy = -(frequency * frequency.clamp(min=1e-9).log2()).sum().item()
        bpd = vae.elbo_to_bpd(sum(vae.evaluate(self.model, self.images[:500])), [1, 1, 28, 28])
        self.assertLess(bpd, 0.9 * entropy)

    def test_kl_divergence_is_that_of_torch_distributions_and_of_monte_carlo(self):
        torch.manual_seed(0)
        mean, log_std = torch.randn(2, 5, 3).double()
        q = torch.distributions.Normal(mean, log_std.exp())
        p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = vae.kl_divergence(mean, log_std)
        assert_close(kl, torch.distributions.kl_divergence(q, p).sum(-1))
        z = q.sample((100_000,))
        estimate = (q.log_prob(z) - p.log_prob(z)).sum(-1).mean(0)
        assert_close(kl, estimate, atol=0.03, rtol=0.01)

    def test_reparameterized_draws_have_the_mean_and_std_and_pass_gradients(self):
        torch.manual_seed(0)
        mean, std = torch.tensor([1., -2.]), torch.tensor([0.5, 3.])
        z = vae.sample_reparameterize(mean.expand(100_000, 2), std.expand(100_000, 2))
        assert_close(z.mean(0), mean, atol=0.05, rtol=0)
        assert_close(z.std(0), std, atol=0.05, rtol=0)
        z = vae.sample_reparameterize(mean.requires_grad_(), std.requires_grad_())
        z.sum().backward()
        assert_close(mean.grad, torch.ones(2))
        assert_close(std.grad, ((z - mean) / std).detach())

    def test_reconstruction_loss_is_the_categorical_log_probability_of_all_channels(self):
        torch.manual_seed(0)
        logits, x = torch.randn(4, 16, 3, 9, 9), torch.randint(16, (4, 3, 9, 9))
        categorical = torch.distributions.Categorical(logits=logits.movedim(1, -1))
        expected = -categorical.log_prob(x).sum((1, 2, 3))
        assert_close(vae.reconstruction_loss(logits, x.to(torch.uint8)), expected)

    def test_both_likelihood_estimates_equal_the_integral_at_one_dimension(self):
        class Toy(nn.Module):  # 2x2 images whose logits are linear in z, and a rough posterior
            def encoder(self, x):
                return torch.full((len(x), 1), 0.3), torch.full((len(x), 1), -0.2)

            def decoder(self, z):
                return (z * slopes).view(-1, 16, 1, 2, 2)

        torch.manual_seed(0)
        slopes, x = torch.randn(64), torch.randint(16, (8, 1, 2, 2))
        z = torch.linspace(-8, 8, 4001).unsqueeze(1)
        log_prior = torch.distributions.Normal(0, 1).log_prob(z.squeeze(1))
        exact = torch.stack([
            (log_prior - vae.reconstruction_loss(Toy().decoder(z), image.expand(4001, 1, 2, 2)))
            .logsumexp(0) + math.log(16 / 4000) for image in x])
        for from_prior in (False, True):
            estimate = vae.log_likelihood(Toy(), x, 10_000, from_prior)
            self.assertLess((estimate - exact).abs().max().item(), 0.05, from_prior)

    def test_evaluation_weighs_each_image_the_same_and_repeats_its_noise(self):
        images = self.images[:101]  # the last batch has one
        rec, kl = vae.evaluate(lambda x: (x.double().mean(), -x.double().mean()), images)
        self.assertAlmostEqual(rec, images.double().mean().item(), places=9)
        self.assertAlmostEqual(kl, -rec, places=9)
        self.assertEqual(vae.evaluate(self.model, images), vae.evaluate(self.model, images))

    def test_log_std_is_bounded_and_keeps_its_gradient(self):
        encoder = vae.Encoder(z_dim=3)
        nn.init.zeros_(encoder.log_std.weight)
        for bias, expected in ((1, 1), (100, 5), (-100, -5), (15, 5)):
            nn.init.constant_(encoder.log_std.bias, bias)
            log_std = encoder(self.images[:2])[1]
            assert_close(log_std, torch.full_like(log_std, expected), atol=0.03, rtol=0)
        log_std.sum().backward()
        self.assertGreater(encoder.log_std.bias.grad.min().item(), 1e-3)

    def test_images_of_any_size_and_number_of_channels_are_learned_and_drawn(self):
        for channels, size in SHAPES:
            model = vae.VAE(5, 4, channels, size)
            x = torch.randint(16, (3, channels, size, size), dtype=torch.uint8)
            sum(model(x)).backward()
            for name, parameter in model.named_parameters():
                self.assertGreater(parameter.grad.abs().sum().item(), 0, (channels, size, name))
            self.assertEqual(model.sample(2).shape, (2, channels, size, size))
            self.assertEqual(vae.mean_image(model.decoder(torch.randn(3, 5))).shape, x.shape)

    def test_other_images_are_refused_by_dtype_or_shape(self):
        x = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        for wrong, named in ((x.float(), "float32"), (x.expand(2, 3, 28, 28), "3, 28, 28"),
                             (x[..., :27], "28, 27"), (x[:, 0], "2, 28, 28")):
            with self.assertRaisesRegex(AssertionError, f"expected.*{named}"):
                self.model(wrong)

    def test_samples_follow_the_decoders_categorical(self):
        model = vae.VAE(z_dim=2, num_filters=4, channels=2)
        for parameter in model.decoder.parameters():
            nn.init.zeros_(parameter)
        torch.manual_seed(0)
        logits = torch.randn(16, 2)  # of each channel, the same for every pixel
        model.decoder.net[-2].bias.data = logits.flatten()
        samples = model.sample(200)  # [200, 2, 28, 28]
        for channel in (0, 1):
            x = samples[:, channel].flatten()
            frequency = torch.bincount(x, minlength=16) / len(x)
            assert_close(frequency, logits[:, channel].softmax(0), atol=0.005, rtol=0)

    def test_the_plane_grows_to_the_right_and_upwards_over_the_priors_percentiles(self):
        z = common.prior_grid(3)
        expected = [[x, y] for y in (5 / 6, 1 / 2, 1 / 6) for x in (1 / 6, 1 / 2, 5 / 6)]
        cdf = torch.distributions.Normal(0, 1).cdf(z)
        assert_close(cdf, torch.tensor(expected), atol=1e-5, rtol=0)
        decoder = vae.Decoder(z_dim=2, num_filters=4)
        with torch.no_grad():
            expected = vae.mean_image(decoder(z))
        assert_close(vae.visualize_manifold(decoder, grid_size=3), expected)


# -- The adversarial autoencoder --------------------------------------------------------------


class AAE(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.x = aae.to_float(render_glyphs()[0][:64])

    def test_images_of_any_size_and_number_of_channels_are_learned_and_drawn(self):
        for (channels, size), posterior in itertools.product(SHAPES, aae.POSTERIORS):
            model = aae.AdversarialAE(5, posterior, 4, channels, size)
            x = torch.rand(3, channels, size, size)
            recon, z = model(x)
            model.autoencoder_loss(x, recon, z, 0.995)[0].backward()
            for name, parameter in model.named_parameters():
                self.assertGreater(parameter.grad.abs().sum().item(), 0, (posterior, name))
            self.assertEqual((recon.shape, z.shape), (x.shape, (3, 5)))
            self.assertEqual(model.sample(2).shape, (2, channels, size, size))
            self.assertLessEqual(model.decoder(100 * z).abs().max().item(), 1)

    def test_other_images_are_refused_by_dtype_or_shape(self):
        model, x = aae.AdversarialAE(), torch.zeros(2, 1, 28, 28)
        for wrong, named in ((x.to(torch.uint8), "uint8"), (x.expand(2, 3, 28, 28), "3, 28, 28"),
                             (x[..., :27], "28, 27"), (x[:, 0], "2, 28, 28")):
            with self.assertRaisesRegex(AssertionError, f"expected.*{named}"):
                model(wrong)

    def test_both_losses_are_their_formulas_for_any_lambda(self):
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

    def test_accuracy_counts_draws_of_the_prior_and_codes_alike(self):
        model = aae.AdversarialAE(z_dim=1)
        for slope, z, expected in ((1, -5., 0.75), (1, 5., 0.25), (0, 5., 0.5)):
            model.discriminator.forward = lambda z, slope=slope: slope * z  # draws: half above 0
            _, accuracy = model.discriminator_loss(torch.full((100_000, 1), z))
            self.assertAlmostEqual(accuracy.item(), expected, delta=0.01)

    @torch.no_grad()
    def test_the_three_posteriors_draw_codes_as_they_should(self):
        x = self.x[:1].expand(5_000, -1, -1, -1)
        for posterior, low, high in (("deterministic", 0, 1e-5), ("gaussian", 1e-3, 100),
                                     ("universal", 1e-3, 100)):
            encoder = aae.Encoder(2, posterior)
            spread = encoder(x[:200]).std(0)
            self.assertTrue(low <= spread.min() and spread.max() < high, posterior)
        encoder = aae.Encoder(2, "gaussian")
        encoder.out.weight.zero_()
        encoder.out.bias.copy_(torch.tensor([1., -2., math.log(0.5), 0.]))  # mean, log std
        z = encoder(x)
        assert_close(z.mean(0), torch.tensor([1., -2]), atol=0.05, rtol=0)
        assert_close(z.std(0), torch.tensor([0.5, 1]), atol=0.02, rtol=0)
        encoder.out.bias.fill_(1e4)
        self.assertTrue(encoder(x[:10]).isfinite().all())

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

    def test_the_distance_to_the_prior_is_1_for_draws_of_it_and_more_for_other_codes(self):
        class Fixed(nn.Module):  # codes are draws of N(0, spread^2), images come back as zeros
            def forward(self, x):
                return torch.zeros_like(x), spread * torch.randn(len(x), 8, generator=generator)

        generator = torch.Generator().manual_seed(3)
        images = render_glyphs()[0][:2050]  # the last batch is smaller
        for spread, low, high in ((1, 0.8, 1.25), (1.2, 3, 20)):
            mse, codes, distance = aae.evaluate(Fixed(), images, num_pairs=5)
            self.assertTrue(low < distance < high, (spread, distance))
            self.assertEqual((codes.shape, codes.dtype), ((2050, 8), torch.float64))
            self.assertAlmostEqual(mse, (aae.to_float(images)**2).mean().item(), places=5)
        model = aae.AdversarialAE(posterior="gaussian", num_filters=4)
        self.assertEqual(aae.evaluate(model, images)[0], aae.evaluate(model, images)[0])


# -- What the scripts share -------------------------------------------------------------------


def paste(path, names):
    """The definitions `names`, and those of the file that they use, run by themselves with nothing
    of the file but its imports of torch and the standard library -> their namespace"""
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


class Common(TemporaryFolder):
    def test_parts_run_when_pasted_with_torch_alone(self):
        x = render_glyphs()[0][:2]
        parts = paste(HERE / "vae.py", ["VAE", "log_likelihood"])
        model = parts["VAE"](2, 4)
        sum(model(x >> 4)).backward()
        self.assertEqual(model.sample(2).shape, x.shape)
        self.assertEqual(parts["log_likelihood"](model, x >> 4, 3).shape, (2,))

        parts = paste(HERE / "aae.py", ["AdversarialAE", "sliced_wasserstein"])
        model = parts["AdversarialAE"](2, "universal")
        recon, z = model(x / 255)
        model.autoencoder_loss(x / 255, recon, z, 0.995)[0].backward()
        model.discriminator_loss(z.detach())[0].backward()
        self.assertEqual(parts["sliced_wasserstein"](z, z, 10), 0)

        weight = nn.Parameter(torch.eye(3))
        weight.sum().backward()
        paste(HERE / "common.py", ["Muon"])["Muon"]([weight], 0.1, 0.0).step()
        self.assertTrue((weight != torch.eye(3)).any())

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

    @needs_gpu
    def test_a_step_recorded_as_a_cuda_graph_computes_what_it_does_by_itself(self):
        results = []
        for record in (common.cuda_graph, lambda step: step):
            torch.manual_seed(0)
            weight = torch.randn(5, 5, device="cuda", requires_grad=True)
            lr = torch.zeros((), device="cuda")
            optimizer = common.Muon([weight], lr, weight_decay=0.1)

            def step(x, y, weight=weight, optimizer=optimizer):
                loss = (x @ weight + y + torch.randn_like(x)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.detach()

            recorded, losses = record(step), []
            for i in range(12):  # two shapes, each recorded at its fourth call
                lr.fill_(0.1 / (i + 1))
                x = torch.full((4 + i % 2, 5), 1.0 + i, device="cuda")
                losses.append(recorded(x, 2 * x).item())
            results.append(losses)
        np.testing.assert_allclose(*results, rtol=1e-5)

    def test_a_run_never_takes_the_folder_of_another_even_if_they_start_at_once(self):
        Path("runs/a").mkdir(parents=True)
        self.assertEqual(common.new_run_folder("runs/a"), Path("runs/a"))  # no run was there
        Path("runs/a-2").touch()
        self.assertEqual(common.new_run_folder("runs/a"), Path("runs/a-3"))
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            self.assertEqual(len(set(pool.map(common.new_run_folder, ["b"] * 20))), 20)

    def test_a_checkpoint_is_written_whole_or_not_at_all_and_only_with_finite_weights(self):
        checkpoint = {"model": {"w": torch.arange(1000.)}, "args": {"script": "vae.py"}}
        common.save_checkpoint(Path("a.pt"), checkpoint)
        before = Path("a.pt").read_bytes()
        with self.assertRaisesRegex(common.UserError, "no longer finite"):
            common.save_checkpoint(Path("a.pt"), {"model": {"w": torch.tensor([1, math.nan])}})
        with self.assertRaises(KeyError):  # a stop in the middle
            common.save(Path("a.pt"), lambda file: file.write(b"half") and {}["a key"])
        self.assertEqual(Path("a.pt").read_bytes(), before)
        identical(common.load_checkpoint(Path("a.pt"), "vae.py")["model"], checkpoint["model"])

    def test_a_pickle_that_runs_code_is_not_run(self):
        class Harm:
            def __reduce__(self):
                return open, ("harm", "w")

        torch.save({"model": {}, "args": {"script": "vae.py"}, "x": Harm()}, "last.pt")
        with self.assertRaisesRegex(common.UserError, "last.pt cannot be read"):
            common.load_checkpoint(Path("last.pt"), "vae.py")
        self.assertEqual(os.listdir(), ["last.pt"])

    def test_pictures_are_grids_with_a_row_after_the_other(self):
        images = torch.arange(6.).view(6, 1, 1, 1).expand(6, 3, 2, 2) / 5
        common.save_images("grid.png", images, columns=3, padding=0)
        grid = np.asarray(Image.open("grid.png"))[::4, ::4]  # [rows, columns, RGB]
        self.assertEqual(grid.tolist(), [[[v] * 3 for v in row] for row in (
            (0, 51, 102), (153, 204, 255))])

    def test_ten_examples_are_of_as_many_labels_as_there_are(self):
        for num_labels in (1, 3, 10, 25):
            labels = (torch.arange(1000) - 970).clamp(min=0) % num_labels  # most are 0
            chosen = common.ten_examples(labels)
            self.assertEqual(len(set(chosen.tolist())), 10)
            self.assertEqual(len(set(labels[chosen].tolist())), min(10, num_labels))
        self.assertEqual(len(common.ten_examples(torch.zeros(3))), 3)


# -- Images -----------------------------------------------------------------------------------


def load(*argv):
    """-> args and images, as the image scripts load them"""
    parser = argparse.ArgumentParser(prog="test")
    common.add_image_arguments(parser, batch_size=1)
    common.add_run_arguments(parser)
    args = parser.parse_args([str(word) for word in argv])
    return args, common.load_images(args, torch.device("cpu"))


def write_pictures(folder, colour=True):
    """40 pictures in two folders: a dark half and a light one, more or less red."""
    for i in range(40):
        path = Path(folder, "ab"[i % 2])
        path.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 24, 3), 5 * i, dtype=np.uint8)
        pixels[:10] = (250, 5 * i, 5 * i) if colour else 250
        Image.fromarray(pixels).save(path / f"{i:02d}.png")


class Images(TemporaryFolder):
    def test_glyphs_are_the_same_every_time_and_of_all_digits(self):
        images, labels = render_glyphs()
        self.assertEqual((images.shape, images.dtype), ((70_000, 1, 28, 28), torch.uint8))
        identical((images, labels), render_glyphs.__wrapped__())
        self.assertGreater(torch.bincount(labels).min().item(), 6000)
        self.assertTrue(15 < images.float().mean().item() < 90)  # ink, and not too much of it

    def test_the_split_into_train_val_and_test_is_fixed_and_limit_takes_the_first(self):
        args, (train, val, test, val_labels) = load("--dataset", "glyphs", "--seed", 1)
        images, labels = render_glyphs()
        order = torch.randperm(60_000, generator=torch.Generator().manual_seed(42))
        identical(torch.cat([train, val]), images[order])
        identical(test, images[60_000:])
        identical(val_labels, labels[order[54_000:]])
        self.assertEqual((len(val), args.num_images, args.image_size), (6000, 70_000, 28))
        few = load("--dataset", "glyphs", "--limit", 100)[1]
        identical(few[0], train[:100])
        identical(few[1:3], (val[:10], test[:10]))

    @needs_mnist
    def test_mnist_is_read_from_its_files_packed_or_not(self):
        import gzip

        Path("packed/MNIST/raw").mkdir(parents=True)
        for path in (DATA_DIR / "MNIST/raw").glob("*-ubyte"):
            with gzip.GzipFile(f"packed/MNIST/raw/{path.name}.gz", "wb", 1, mtime=0) as file:
                file.write(path.read_bytes())
        self.patch_mnist_checksums("packed/MNIST/raw")
        for folder in (DATA_DIR, "packed"):
            args, (_, _, test, _) = load("--data-dir", folder)
            self.assertEqual((args.dataset, len(test)), ("mnist", 10_000))
            self.assertAlmostEqual(test.double().mean().item(), 33.791, places=3)

    def patch_mnist_checksums(self, folder):
        import torchvision

        self.patch(torchvision.datasets.MNIST, "resources", [
            (path.name, hashlib.md5(path.read_bytes()).hexdigest())
            for path in sorted(Path(folder).glob("*.gz"))])

    def without_network(self):
        import torchvision

        self.patch(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])

    def test_without_network_glyphs_stand_in_only_if_nothing_was_asked_for(self):
        self.without_network()
        with contextlib.redirect_stderr(io.StringIO()) as err:
            args, _ = load("--limit", 10)
        self.assertEqual(args.dataset, "glyphs")
        self.assertIn("warning: MNIST", err.getvalue())
        for argv, named in ((["--dataset", "mnist"], "MNIST/raw"),
                            (["--data-dir", "other"], "other/MNIST/raw")):
            with self.assertRaisesRegex(common.UserError, named):
                load(*argv)

    @needs_mnist
    def test_a_damaged_file_is_named_and_never_becomes_glyphs(self):
        shutil.copytree(DATA_DIR / "MNIST/raw", "data/MNIST/raw")
        path = Path("data/MNIST/raw/t10k-images-idx3-ubyte")
        content = path.read_bytes()
        for damaged in (content[:-1000], b"", b"no image" + content):
            path.write_bytes(damaged)
            with self.assertRaisesRegex(common.UserError, "data/MNIST/raw is damaged"):
                load()

    def test_own_pictures_are_read_in_colour_and_labelled_by_their_folders(self):
        write_pictures("photos")
        args, (train, val, test, val_labels) = load("--dataset", "photos", "--image-size", 16)
        self.assertEqual([len(train), len(val), len(test)], [32, 4, 4])
        self.assertEqual((train.shape[1:], args.image_size), ((3, 16, 16), 16))
        self.assertTrue((train[:, 0, 0] == 250).all())
        # 5 * i in the lower half; odd i lie in the second folder.
        identical(val[:, 2, -1, 0] // 5 % 2, val_labels.to(torch.uint8))
        self.assertEqual(load("--dataset", "photos")[0].image_size, 32)
        write_pictures("grey", colour=False)
        self.assertEqual(load("--dataset", "grey")[1][0].shape[1:], (1, 32, 32))

    def test_every_kind_of_picture_is_read_as_it_looks(self):
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
        Path("a/11.png").write_bytes(b"broken")
        with contextlib.redirect_stderr(io.StringIO()) as err:
            images, _ = common.read_pictures("a", 8)
        self.assertIn("11.png", err.getvalue())
        self.assertEqual(images.shape, (10, 1, 8, 8))
        assert_close(images[:, :, :3].float(), torch.full((10, 1, 3, 8), 200.), atol=8, rtol=0)
        assert_close(images[:, :, 5:].float(), torch.zeros(10, 1, 3, 8), atol=8, rtol=0)


# -- Runs of the scripts ----------------------------------------------------------------------

# A short run of each script: 15 steps per epoch
SHORT = {vae: "--dataset glyphs --limit 300 --batch-size 20 --num-filters 4 --device cpu",
         aae: "--dataset glyphs --limit 300 --batch-size 20 --num-filters 4 --device cpu"}


def short(script, epochs, *more):
    return [*SHORT[script].split(), "--epochs", epochs, *more]


def no_pictures(test):
    """A decorator: the scripts save no pictures, which take most of a short run's time."""
    for name in ("vae.save_pictures", "aae.save_pictures", "common.save_curves"):
        test = mock.patch(name, lambda *_, **__: None)(test)
    return test


def content(run):
    """-> all tensors of a run's checkpoints; all results except times"""
    saved = {path.name: torch.load(path) for path in sorted(Path(run).glob("*.pt"))}
    test = json.loads(Path(run, "test.json").read_text())
    results = [{name: value for name, value in row.items()
                if name not in ("seconds", "images_per_s")}
               for row in (*saved["last.pt"]["rows"], *read_rows(run), test)]
    return {name: (checkpoint["model"], checkpoint.get("optimizers"))
            for name, checkpoint in saved.items()}, results


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
    torch.set_num_threads(1)
    torch.Tensor.backward = dangerous(torch.Tensor.backward)
    os.fsync, os.replace = dangerous(os.fsync), dangerous(os.replace)
    common.render_glyphs = lambda: torch.load("glyphs.pt")
    no_pictures(sys.modules[script].main)([str(word) for word in argv])


class Runs(TemporaryFolder):
    def assert_the_same_run(self, first, second):
        (a, results), (b, other_results) = content(first), content(second)
        identical(a, b)
        self.assertEqual(results, other_results)

    @needs_processes
    @no_pictures
    def test_killed_five_times_and_resumed_ends_bit_for_bit_the_same(self):
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["aae", "vae"])
        torch.save(render_glyphs(), "glyphs.pt")
        for script in SHORT:
            name = script.__name__
            for run in ("whole", "killed"):
                self.succeed(script, *short(script, 2, "--out-dir", f"{name}-{run}"))
            self.succeed(script, "--resume", f"{name}-whole", "--epochs", 5)
            # Counted are backward passes, and two calls for each file that is written. The first
            # writes, a step, among an epoch's last writes, a step of the next epoch, a step:
            steps = 15 if script is vae else 30
            for instant in (2, 12, steps + 7, steps + 15, 9):
                process = processes.Process(target=run_and_die, args=(name, [
                    "--resume", f"{name}-killed", "--epochs", 5], instant))
                process.start()
                process.join()
                self.assertEqual(process.exitcode, -signal.SIGKILL)
            self.succeed(script, "--resume", f"{name}-killed", "--epochs", 5)
            self.assert_the_same_run(f"{name}-whole", f"{name}-killed")

    @no_pictures
    def test_ctrl_c_ends_a_run_in_one_line(self):
        for script in SHORT:
            with mock.patch.object(common, "save_checkpoint", side_effect=KeyboardInterrupt):
                status, _, err = run_script(script, *short(script, 1))
            self.assertEqual((status, err.strip().count("\n")), (130, 0), err)

    @no_pictures
    def test_a_finished_run_resumed_is_tested_again_and_can_be_extended_with_other_rates(self):
        for script, rate in ((vae, "--lr"), (aae, "--d-lr")):
            self.succeed(script, *short(script, 2, "--out-dir", script.__name__))
            before = content(script.__name__)
            os.remove(f"{script.__name__}/test.json")
            self.succeed(script, "--resume", script.__name__)
            self.assertEqual(content(script.__name__)[1], before[1])
            self.succeed(script, "--resume", script.__name__, "--epochs", 3, rate, 1e-4)
            rows = read_rows(script.__name__)
            self.assertEqual([row["epoch"] for row in rows], [1, 2, 3])
            args = json.loads(Path(script.__name__, "args.json").read_text())
            self.assertEqual((args["epochs"], args[rate[2:].replace("-", "_")]), (3, 1e-4))

    @no_pictures
    def test_what_does_not_fit_a_run_is_refused(self):
        for script, other in ((vae, "aae"), (aae, "vae")):
            name = script.__name__
            self.succeed(script, *short(script, 1, "--out-dir", name))
            Path("half").mkdir(exist_ok=True)
            Path("half/last.pt").write_bytes(Path(name, "last.pt").read_bytes()[:1000])
            self.refuse(script, "--resume", "nowhere", naming="nowhere/last.pt")
            self.refuse(script, "--resume", "half", naming="half/last.pt")
            for flag, value in (("--seed", 1), ("--z-dim", 3), ("--batch-size", 10),
                                ("--limit", 100), ("--out-dir", "b"), ("--dataset", "kmnist")):
                self.refuse(script, "--resume", name, "--epochs", 2, flag, value, naming=flag)
            if Path(other).exists():
                self.refuse(script, "--resume", other, naming=f"{other}.py")

    @no_pictures
    def test_a_changed_folder_of_pictures_is_noticed_on_resume(self):
        write_pictures("photos")
        for script in SHORT:
            run = f"runs/{script.__name__}"
            argv = short(script, 1, "--dataset", "photos", "--image-size", 16, "--out-dir", run)
            self.succeed(script, *argv)
            self.succeed(script, "--resume", run, "--epochs", 2)
            shutil.copy("photos/a/00.png", "photos/a/new.png")
            self.refuse(script, "--resume", run, "--epochs", 3, naming="41")
            os.remove("photos/a/new.png")

    def test_wrong_values_are_answered_in_one_line(self):
        Path("a_file").touch()
        Path("empty").mkdir()
        for script, rates in ((vae, ["--lr"]), (aae, ["--ae-lr", "--d-lr"])):
            for argv in ("--seed -1", f"--seed {10**30}", "--limit 0", "--batch-size 0",
                         "--epochs 0", "--z-dim 0", "--z-dim two", "--image-size 4", "--data 2",
                         *(f"{rate} {value}" for rate in rates for value in ("-1", "nan", "inf")),
                         "--out-dir a_file/run", "--dataset empty", "--dataset imagenet",
                         "--dataset glyphs --image-size 32", "--dataset mnist --data-dir a_file",
                         *["--device cuda"] * (not torch.cuda.is_available()),
                         *["--lam 1.01", "--lam nan", "--posterior normal"] * (script is aae)):
                flag = argv.split()[-2] if " " in argv else argv
                naming = {"--out-dir": "a_file", "--data-dir": "a_file", "--dataset": "dataset",
                          "--image-size": "image"}.get(flag, flag)
                with self.subTest(argv):
                    self.refuse(script, *SHORT[script].split(), *argv.split(), naming=naming)

    def test_torchrun_is_for_gpt_alone(self):
        for rank, lines in ((0, 1), (1, 0)):
            with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "RANK": str(rank)}):
                status, out, err = run_script(vae, *short(vae, 1))
            self.assertEqual((status, out, len(err.splitlines())), (2, "", lines))

    @no_pictures
    def test_a_too_high_rate_stops_the_run_before_its_weights_are_saved(self):
        for script, rate in ((vae, "--lr"), (aae, "--ae-lr")):
            status, _, err = run_script(script, *short(script, 1, rate, 1e9, "--out-dir", "a"))
            self.assertEqual((status, len(err.splitlines())), (2, 1), err)
            self.assertIn("no longer finite", err)
            self.assertFalse(Path("a/last.pt").exists())

    def test_a_run_leaves_its_files_and_pictures(self):
        samples = "samples_epoch_000.png samples_epoch_001.png samples_epoch_002.png"
        for script, flags, name, own in (
                (vae, "--z-dim 2", "vae-z2-glyphs", "best.pt bpd.png reconstructions.png "
                 "latents.png manifold.png"),
                (vae, "", "vae-z20-glyphs", "best.pt bpd.png reconstructions.png"),
                (aae, "--z-dim 2 --lam 1", "aae-z2-lam1-glyphs", "manifold.png codes.png mse.png "
                 "adversary.png " + samples.replace("samples", "reconstructions")),
                (aae, "--posterior universal", "aae-z8-lam0.995-universal-glyphs", "codes.png "
                 "mse.png adversary.png " + samples.replace("samples", "reconstructions"))):
            out = self.succeed(script, *short(script, 2, *flags.split()))
            self.assertRegex(out.splitlines()[-1], f"^{name}.* -> runs/{name}$")
            self.assertEqual(sorted(os.listdir(f"runs/{name}")), sorted(
                f"args.json metrics.jsonl last.pt test.json {samples} {own}".split()))
            results = Path(f"runs/{name}/test.json").read_text()
            json.loads(results, parse_constant=self.fail)  # no nan
            opening = out.splitlines()[0]
            self.assertIn(f"--resume runs/{name}", opening)

    @no_pictures
    def test_each_epoch_and_each_seed_has_an_order_of_its_own(self):
        orders, randperm = [], torch.randperm
        for script, seed in itertools.product(SHORT, (1, 1, 2)):
            with mock.patch.object(torch, "randperm", lambda n, **options: orders.append(
                    tuple(randperm(n, **options).tolist())) or torch.tensor(orders[-1])):
                self.succeed(script, *short(script, 2, "--seed", seed))
        orders = [order for order in orders if len(order) == 300]  # without the split's
        for first, again, other in (orders[0:6:2], orders[1:6:2], orders[6:12:2], orders[7:12:2]):
            self.assertEqual(first, again)
            self.assertNotEqual(first, other)
        self.assertNotEqual(orders[0], orders[1])

    @no_pictures
    def test_bfloat16_learns_as_float32_does(self):
        for script, column in ((vae, "train_bpd"), (aae, "train_mse")):
            losses = []
            for dtype in (torch.float32, torch.bfloat16):
                device = torch.device("cpu"), dtype
                with mock.patch.object(common, "pick_device", lambda *_, d=device, **__: d):
                    self.succeed(script, *short(script, 2, "--out-dir", f"runs/{dtype}"))
                state = torch.load(f"runs/{dtype}/last.pt")
                losses.append(state["rows"][-1][column])
                self.assertTrue(all(w.dtype == torch.float32 for w in state["model"].values()))
                shutil.rmtree("runs")
            self.assertLess(abs(losses[1] / losses[0] - 1), 0.03)

    @no_pictures
    def test_in_a_changed_copy_every_parameter_is_trained_and_dropout_is_off_in_evaluation(self):
        for script, name in ((vae, "VAE"), (aae, "AdversarialAE")):
            modes = set()

            class Changed(getattr(script, name)):
                def __init__(self, **config):
                    super().__init__(**config)
                    self.scale = nn.Parameter(torch.ones(()))
                    self.cube = nn.Parameter(torch.ones(1, 28, 28))
                    decode = self.decoder.forward
                    self.decoder.forward = lambda z: self.scale * self.cube * decode(z)

                def forward(self, x, modes=modes):
                    modes.add((self.training, torch.is_grad_enabled()))
                    return super().forward(x)

            with mock.patch.object(script, name, Changed):
                self.succeed(script, *short(script, 2, "--out-dir", name))
            trained = torch.load(f"{name}/last.pt")["model"]
            for weight in (trained["scale"], trained["cube"]):
                self.assertGreater((weight - 1).abs().min().item(), 0)
            self.assertEqual(modes, {(True, True), (False, False)})

    @no_pictures
    def test_own_colour_pictures_are_learned_better_than_their_mean_image(self):
        write_pictures("photos")
        for script, name in ((vae, "VAE"), (aae, "AdversarialAE")):
            self.succeed(script, *short(script, 100, "--dataset", "photos", "--image-size", 16,
                                        "--num-filters", 16, "--batch-size", 8, "--z-dim", 4))
            run, = Path("runs").glob(f"{script.__name__}-*-photos")
            saved = torch.load(run / "last.pt", weights_only=True)
            model = getattr(script, name)(**saved["config"]).eval()
            model.load_state_dict(saved["model"])
            _, (train, val, _, _) = load("--dataset", "photos", "--image-size", 16)
            with torch.no_grad():
                if script is vae:
                    means, _ = model.encoder(vae.to_4_bits(val))
                    rebuilt = vae.mean_image(model.decoder(means))
                else:
                    rebuilt = (model(aae.to_float(val))[0] + 1) / 2
            error = (rebuilt - val / 255).square().mean()
            of_mean = (train.float().mean(0) / 255 - val / 255).square().mean()
            self.assertLess(error, 0.5 * of_mean)

    @no_pictures
    def test_the_best_vae_by_validation_is_tested(self):
        losses = iter([[3, 3], [1, 1], [2, 2], [5, 5], [6, 6]])  # three epochs, test
        with mock.patch.object(vae, "evaluate", lambda *_: next(losses)):
            out = self.succeed(vae, *short(vae, 3, "--out-dir", "a"))
        self.assertIn("epoch 2 of 3 -> a", out)
        self.assertEqual(json.loads(Path("a/test.json").read_text())["epoch"], 2)

    @no_pictures
    def test_codes_come_to_the_prior_only_if_they_are_asked_to(self):
        for lam, low, high in ((0.995, 0, 3), (1, 4, 1000)):
            self.succeed(aae, *short(aae, 6, "--limit", 2000, "--ae-lr", 1e-2, "--d-lr", 1e-3,
                                     "--num-filters", 8, "--lam", lam, "--out-dir", f"lam{lam}"))
            test = json.loads(Path(f"lam{lam}/test.json").read_text())
            self.assertLess(test["test_mse"], 0.18)  # 0.22: the mean of all images
            self.assertTrue(low < test["val_distance"] < high, test)

    @no_pictures
    def test_each_phase_of_the_aae_moves_its_own_networks_alone(self):
        torch.manual_seed(42)
        start = aae.AdversarialAE(num_filters=4).state_dict()
        for flags, expected in (("", {"encoder", "decoder", "discriminator"}),
                                ("--d-lr 0", {"encoder", "decoder"}),
                                ("--ae-lr 0", {"discriminator"})):
            self.succeed(aae, *short(aae, 1, *flags.split(), "--out-dir", "a"))
            last = torch.load("a/last.pt")["model"]
            moved = {name.split(".")[0] for name in start
                     if (start[name] - last[name]).abs().max() > 1e-20}
            self.assertEqual(moved, expected, flags)
            shutil.rmtree("a")


class Result(unittest.TextTestResult):
    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


class Runner(unittest.TextTestRunner):
    resultclass = Result


if __name__ == "__main__":
    result = unittest.main(exit=False, verbosity=2, testRunner=Runner).result
    failed = len(result.failures) + len(result.errors)
    for test, reason in result.skipped:
        print(f"skipped {test}: {reason}")
    print(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
    sys.exit(bool(failed))
