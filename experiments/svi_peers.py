"""The contestants of svi_speed.py that are not this package: one VAE, trained by Pyro, PyTorch, NumPyro and pythae.

The VAE is that of svi_vae.py. The KL is exact except in Pyro's `Trace_ELBO`. Peers are imported inside the functions:
without them the file works, and the ImportError says what is missing. To add a contestant, write such a function and a line
of `PEERS`.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from svi_vae import LEARNING_RATE, MINIMUM_SCALE, Builder, Contestant, Network, Order, Size
from torch import Tensor, nn

_count = itertools.count()


def _pyro_pair(network: Network, latent: int, register: Callable[[str, nn.Module], Any]) -> tuple[Any, Any]:
    """Model and guide as Pyro's VAE example writes them."""
    import pyro
    import pyro.distributions as dist

    name = f"peer{next(_count)}"

    def model(x: Tensor) -> None:
        register(f"{name}.decoder", network.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), latent), x.new_ones(len(x), latent)).to_event(1)
            logits = network.decoder(pyro.sample("z", prior))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        register(f"{name}.encoder", network.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*network.encoder(x)).to_event(1))

    return model, guide


def pyro_svi(size: Size, rows: Tensor, *, elbo: str) -> Contestant:
    """`pyro.infer.SVI.step` with an ELBO of `pyro.infer`; validation of arguments on, as it is unless switched off."""
    import pyro
    import pyro.infer
    import pyro.optim

    network, order = Network(size), Order(len(rows), size.batch)
    pair = _pyro_pair(network, size.latent, pyro.module)
    svi = pyro.infer.SVI(*pair, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=getattr(pyro.infer, elbo)())

    def run(steps: int) -> None:
        for index in order.take(steps):
            svi.step(rows.index_select(0, index))

    return Contestant(run, network.copied)


def by_loss(size: Size, rows: Tensor, network: Network, loss: Callable[[Tensor], Tensor], **settings: Any) -> Contestant:
    """A loop of a loss (N, pixels) -> () of torch and `torch.optim.Adam` with these settings."""
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, **settings)
    order = Order(len(rows), size.batch)

    def run(steps: int) -> None:
        for index in order.take(steps):
            optimiser.zero_grad()
            loss(rows.index_select(0, index)).backward()
            optimiser.step()

    return Contestant(run, network.copied)


def pyro_loss(size: Size, rows: Tensor) -> Contestant:
    """A Pyro ELBO's differentiable loss with torch's fused Adam, nothing registered in the parameter store."""
    import pyro.infer

    network = Network(size)
    model, guide = _pyro_pair(network, size.latent, lambda name, module: module)
    elbo = pyro.infer.TraceMeanField_ELBO()
    return by_loss(size, rows, network, lambda x: elbo.differentiable_loss(model, guide, x) / len(x), fused=True)


def torch_eager(size: Size, rows: Tensor, **settings: Any) -> Contestant:
    """Written by hand in PyTorch, not compiled."""
    network = Network(size)
    return by_loss(size, rows, network, network.loss, **settings)


def torch_compiled(size: Size, rows: Tensor, **settings: Any) -> Contestant:
    """The same with the loss, and so its gradients, through `torch.compile`; fused Adam outside."""
    network = Network(size)
    return by_loss(size, rows, network, torch.compile(network.loss, dynamic=False, **settings), fused=True)


def _numpyro(size: Size, rows: Tensor) -> tuple[Any, Any, Any]:
    """`SVI` of NumPyro, its initial state from the common weights, and the rows in JAX."""
    import jax
    import numpyro
    import numpyro.distributions as dist
    from jax import numpy as jnp

    start = {name: jnp.asarray(value.numpy().T) for name, value in Network(size).copied().items()}
    encoder_start, decoder_start = (
        {name.removeprefix(role): value for name, value in start.items() if name.startswith(role)}
        for role in ("encoder.", "decoder.")
    )

    def layer(weights: Any, name: str, x: Any) -> Any:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def encode(weights: Any, x: Any) -> tuple[Any, Any]:
        features = jax.nn.silu(layer(weights, "body", x))
        scale = jax.nn.softplus(layer(weights, "raw_scale", features)) + MINIMUM_SCALE
        return layer(weights, "loc", features), scale

    def decode(weights: Any, z: Any) -> Any:
        return layer(weights, "logits", jax.nn.silu(layer(weights, "body", z)))

    def model(x: Any) -> None:
        decoder = numpyro.module("decoder.", (lambda key, shape: (None, decoder_start), decode), ())
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(size.latent), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encoder = numpyro.module("encoder.", (lambda key, shape: (None, encoder_start), encode), ())
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(*encoder(x)).to_event(1))

    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), numpyro.infer.TraceMeanField_ELBO())
    inputs = jnp.asarray(rows.numpy())
    return svi, svi.init(jax.random.key(0), inputs[: size.batch]), inputs


def _numpyro_weights(svi: Any, state: Any) -> dict[str, Tensor]:
    """Back into torch under the names of `Network`."""
    found = svi.get_params(state)
    return {
        role + name: torch.tensor(value.__array__().T.copy())
        for role in ("encoder.", "decoder.")
        for name, value in found[f"{role}$params"].items()
    }


def numpyro_update(size: Size, rows: Tensor) -> Contestant:
    """`jax.jit` of `svi.update` called once a batch; rows are taken by index inside of it."""
    import jax

    svi, state, inputs = _numpyro(size, rows)
    order = Order(len(rows), size.batch)

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, i: Any, batches: Any, inputs: Any) -> Any:
        return svi.update(state, inputs[batches[i]])[0], i + 1

    def run(steps: int) -> None:
        nonlocal state
        batches, i = jax.numpy.asarray(order.take(steps).int().numpy()), jax.numpy.int32(0)
        for _ in range(steps):
            state, i = update(state, i, batches, inputs)
        jax.block_until_ready(state)

    return Contestant(run, lambda: _numpyro_weights(svi, state))


def numpyro_scan(size: Size, rows: Tensor) -> Contestant:
    """All steps of a call (an epoch, say) as one `lax.scan` inside `jax.jit`; a new number of steps compiles anew."""
    import jax

    svi, state, inputs = _numpyro(size, rows)
    order = Order(len(rows), size.batch)

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: Any, batches: Any, inputs: Any) -> Any:
        return jax.lax.scan(lambda state, index: svi.update(state, inputs[index]), state, batches)

    def run(steps: int) -> None:
        nonlocal state
        state, losses = epoch(state, jax.numpy.asarray(order.take(steps).int().numpy()), inputs)
        jax.block_until_ready((state, losses))

    return Contestant(run, lambda: _numpyro_weights(svi, state))


def products(size: Size, rows: Tensor) -> Contestant:
    """The floor: the matrix products of a step alone, forward and backward, into memory that is there already.

    The heads for mu and sigma are one product here; the gradient with respect to the rows is not needed by anyone.
    """
    encoder = [(size.pixels, size.hidden), (size.hidden, 2 * size.latent)]
    layers = [*encoder, (size.latent, size.hidden), (size.hidden, size.pixels)]
    inputs = [torch.rand(size.batch, before) for before, _ in layers]
    outputs = [torch.rand(size.batch, after) for _, after in layers]
    weights, gradients = ([torch.rand(after, before) for before, after in layers] for _ in range(2))

    def run(steps: int) -> None:
        for _ in range(steps):
            for x, weight, y in zip(inputs, weights, outputs, strict=True):
                torch.mm(x, weight.t(), out=y)
            for i in reversed(range(len(layers))):
                torch.mm(outputs[i].t(), inputs[i], out=gradients[i])
                if i > 0:
                    torch.mm(outputs[i], weights[i], out=inputs[i])

    return Contestant(run, dict)


class _Part:
    """The next so many batches of a DataLoader, for a trainer that goes through its loader once a call."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.dataset, self.steps = loader, loader.dataset, 0
        self.endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.endless, self.steps)


def pythae(size: Size, rows: Tensor) -> Contestant:
    """pythae's own `BaseTrainer.train_step` on its `VAE`, without its progress bar.

    Its loop, its DataLoader, its loss; only how many batches a call takes is decided here. Its sigma is
    exp(log_covariance / 2), its likelihood takes probabilities: so the encoder returns 2 log sigma, the decoder sigmoids.
    """
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback

    network = Network(size)

    class Encoding(BaseEncoder):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            loc, scale = network.encoder(x)
            return ModelOutput(embedding=loc, log_covariance=2.0 * scale.log())

    class Decoding(BaseDecoder):  # type: ignore[misc]
        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=network.decoder(z).sigmoid())

    encoder, decoder = Encoding(), Decoding()
    encoder.inner, decoder.inner = network.encoder, network.decoder
    settings = VAEConfig(input_dim=(size.pixels,), latent_dim=size.latent, reconstruction_loss="bce")
    logging.disable(logging.INFO)  # its loggers set their own level
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(
            VAE(settings, encoder=encoder, decoder=decoder),
            BaseDataset(rows, torch.zeros(len(rows))),
            training_config=BaseTrainerConfig(
                output_dir=folder, learning_rate=LEARNING_RATE, per_device_train_batch_size=size.batch, no_cuda=True
            ),
        )
        trainer.prepare_training()
    logging.disable(logging.NOTSET)
    trainer.callback_handler = CallbackHandler(callbacks=[TrainingCallback()], model=trainer.model)
    trainer.train_loader = part = _Part(trainer.train_loader)

    def run(steps: int) -> None:
        part.steps = steps
        trainer.train_step(epoch=1)

    return Contestant(run, network.copied)


FLOOR = "matrix products alone"
PEERS: dict[str, Builder] = {
    "Pyro SVI.step, Trace_ELBO": partial(pyro_svi, elbo="Trace_ELBO"),
    "Pyro SVI.step, TraceMeanField_ELBO": partial(pyro_svi, elbo="TraceMeanField_ELBO"),
    "Pyro ELBO + fused Adam": pyro_loss,
    "PyTorch eager": torch_eager,
    "PyTorch eager, fused Adam": partial(torch_eager, fused=True),
    "PyTorch compiled, fused Adam": torch_compiled,
    "NumPyro jit(update)": numpyro_update,
    "NumPyro lax.scan": numpyro_scan,
    FLOOR: products,
}
QUALITY_ALONE: dict[str, Builder] = {"pythae": pythae}
"""A trainer with a loop and a loader of its own: judged by the time to quality, not by the step."""
