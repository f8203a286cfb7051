"""NFPO on MuJoCo Playground, in JAX: PPO whose policy is a normalizing flow instead of a Gaussian.

Paper: "NFPO: Stabilized Policy Optimization of Normalizing Flow for Robotic Policy Learning" (Shi et al., 2026).

The idea in five lines:
  1. A policy is a density over actions. A RealNVP flow f, conditioned on the observation, maps an action a to a
     latent z = f(a; o) that is N(0, I); the change of variables gives log pi(a|o) = log N(z; 0, I) + log|det df/da|.
  2. To act, draw z and run f backwards. Such a policy can have several modes, and its log-probability is exact.
  3. PPO needs nothing else from a policy, so rollout, GAE, clipped surrogate and critic stay as they are.
  4. Left alone, training inflates the determinant until numbers break. NFPO bounds each scale: l * tanh(s) (Eq. 6).
  5. To deploy, run f backwards from z = 0, the mode of the base distribution (Sec. A.6).

Run:     python nfpo_playground_jax.py --env-id Go1JoystickFlatTerrain
         (the size of the paper, for a GPU; the README has commands for two CPU cores)
Expect:  CartpoleBalance at 990 of 1000 in less than two minutes on two CPU cores, compilation included.

Sections: Args, environment, flow policy and critic, one function for each step of Algorithm 1, checkpoint, evaluation
and export, training. The whole state of a training run is one `TrainState`, and one iteration of Algorithm 1 is one
compiled function from `TrainState` to `TrainState`; Python only logs, saves and draws the progress bar.
"""

import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Optional

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from brax.envs.wrappers.training import EpisodeWrapper, VmapWrapper
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from mujoco import mjx
from mujoco_playground import dm_control_suite, locomotion, manipulation, registry, wrapper
from tensorboardX import SummaryWriter
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Args
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    # What to run
    env_id: str = "CartpoleBalance"
    """name of a MuJoCo Playground environment, also as `module:Name` where importing the module registers it"""
    exp_name: str = "nfpo_playground_jax"
    """name of this experiment, a part of the run's name"""
    seed: int = 1
    """seed of networks, noise, minibatches and environments"""
    total_timesteps: int = 100_000_000
    """environment steps to train for, over all environments and devices"""
    runs_dir: str = "runs"
    """folder that receives one folder a run"""

    # Where to run it
    impl: Optional[Literal["jax", "warp"]] = None
    """implementation of the physics; by default warp on an NVIDIA GPU where it is installed, and jax elsewhere"""
    num_devices: int = 1
    """devices of each process that share the environments (not with --impl warp) and the minibatches"""
    distributed: bool = False
    """one of several processes, which find each other by themselves on SLURM, Open MPI and TPUs"""
    coordinator: Optional[str] = None
    """elsewhere: HOST:PORT of the first process"""
    num_processes: Optional[int] = None
    """elsewhere: number of processes"""
    process_id: Optional[int] = None
    """elsewhere: number of this process, from 0"""

    # What to record
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "nfpo"
    """Weights & Biases project"""
    wandb_entity: Optional[str] = None
    """Weights & Biases entity (team)"""
    capture_video: bool = False
    """film an episode after training, or those of --evaluate, into the run's `videos` folder"""
    checkpoint_interval: int = 50
    """iterations between two checkpoints; the first and the last iteration always write one"""
    keep_interval: Optional[int] = None
    """iterations between checkpoints that are kept beside the newest; none: only the newest is kept"""

    # Continue, evaluate, export
    resume: Optional[str] = None
    """run folder to continue, with the run's own arguments; --total-timesteps may be another, to train longer"""
    evaluate: Optional[str] = None
    """run folder to play instead of training, or a checkpoint that was kept: runs/RUN/checkpoint/500"""
    eval_episodes: int = 10
    """episodes that --evaluate plays, all at once"""
    temperature: float = 0.0
    """factor on the standard deviation of the base noise in --evaluate; 0 is the deterministic deployment mode"""
    export_onnx: Optional[str] = None
    """file that --evaluate writes the deterministic policy to, observation statistics inside"""
    export_npz: Optional[str] = None
    """file that --evaluate writes the weights and statistics to, for `numpy_policy`"""

    # Environment
    domain_randomization: bool = False
    """give every environment a physics model of its own, by the environment's own randomizer"""
    full_reset: bool = False
    """start every episode anew; by default an environment returns to its first state, the same for the whole run, and
    keeps what its task remembers in `info`, which is cheaper"""
    random_initial_steps: bool = True
    """start the first episodes at random step counts, so that not all environments meet the time limit at once"""
    config_overrides: str = "{}"
    """changes to the environment's configuration, as JSON: '{"episode_length": 500}'"""

    # Algorithm 1: PPO, as for MuJoCo Playground in the paper (Sec. A.3)
    learning_rate: float = 5e-4
    """learning rate of Adam; the paper takes 3e-4 for manipulation"""
    num_envs: int = 2048
    """parallel environments, over all devices"""
    num_steps: int = 24
    """steps of each environment in one rollout (T in Algorithm 1)"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0"""
    desired_kl: Optional[float] = None
    """adapt the learning rate to this KL divergence, as rsl_rl does (PPO-adaptive: 0.01)"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 4
    """minibatches an epoch (M in Algorithm 1)"""
    update_epochs: int = 5
    """epochs over each rollout (N in Algorithm 1)"""
    norm_adv: bool = True
    """normalize advantages within a minibatch"""
    clip_coef: float = 0.2
    """clip range of the probability ratio (epsilon in Algorithm 1)"""
    clip_vloss: bool = True
    """clip the value loss as well"""
    ent_coef: float = 0.0
    """entropy coefficient; the entropy is estimated from samples"""
    vf_coef: float = 1.0
    """value-loss coefficient"""
    max_grad_norm: float = 1.0
    """norm to which gradients are clipped, all networks together"""
    critic_hidden_dims: tuple[int, ...] = (512, 256, 128)
    """widths of the critic's hidden layers"""

    # Eq. 6: the flow, and the variants of the paper's ablations
    num_flow_layers: int = 4
    """coupling layers K; fewer than 3 cannot let every action dimension act on every other"""
    hidden_dim: int = 256
    """width of each coupling network"""
    hidden_layers: int = 1
    """hidden layers of each coupling network"""
    scale_fn: Literal["tanh", "clip", "none", "zero", "asymmetric"] = "tanh"
    """bound of the log-scale s: l*tanh(s), clamp(s, -l, l), s itself, 0 (only shifts, NICE), or Andrade (2024)"""
    scale_bound: float = 0.5
    """the bound l of the log-scale, for tanh and clip"""
    learned_base_std: bool = False
    """learn the standard deviation of the base distribution (not in the paper)"""
    action_noise: float = 0.0
    """standard deviation of the noise added to the actions that are trained on (Sec. 5.1)"""

    @property
    def batch_size(self) -> int:
        """Transitions in one rollout, T * N."""
        return self.num_envs * self.num_steps

    @property
    def num_iterations(self) -> int:
        """Iterations of Algorithm 1's outer loop; a last incomplete batch is not trained on."""
        return self.total_timesteps // self.batch_size


FLOW_FLAGS = ("num_flow_layers", "hidden_dim", "hidden_layers", "scale_fn", "scale_bound", "learned_base_std")
# Flags that may differ between a run and its continuation, or its evaluation: they do not change what is computed.
LOG_FLAGS = ("track", "wandb_project_name", "wandb_entity", "capture_video", "runs_dir")
DEVICE_FLAGS = ("num_devices", "distributed", "coordinator", "num_processes", "process_id")
RESUME_FLAGS = ("resume", "keep_interval", "total_timesteps", *DEVICE_FLAGS, *LOG_FLAGS)
PLAY_FLAGS = ("eval_episodes", "temperature", "seed", "impl", "domain_randomization", "config_overrides")
EVALUATE_FLAGS = ("evaluate", *PLAY_FLAGS, "export_onnx", "export_npz", *LOG_FLAGS)


class BadInput(ValueError):
    """An input that the user has to change; `main` prints it as one line and exits with status 2."""


def check_args(args: Args, policy_class: type) -> None:
    """Raise `BadInput` naming flag, value and what is allowed. Runs before anything is written."""
    at_least_1 = "num_envs num_steps num_minibatches update_epochs num_flow_layers hidden_dim hidden_layers"
    for names, allowed, is_allowed in (
        (at_least_1 + " num_devices checkpoint_interval eval_episodes", "at least 1", lambda x: x >= 1),
        ("learning_rate scale_bound max_grad_norm", "a number above 0", lambda x: 0 < x < float("inf")),
        ("gamma gae_lambda", "between 0 and 1", lambda x: 0 <= x <= 1),
        ("clip_coef", "above 0 and below 1", lambda x: 0 < x < 1),
        ("ent_coef vf_coef action_noise temperature", "a number of at least 0", lambda x: 0 <= x < float("inf")),
        ("desired_kl", "above 0", lambda x: x is None or x > 0),
        ("keep_interval", "at least 1", lambda x: x is None or x >= 1),
        ("seed", "between 0 and 2**31 - 1", lambda x: 0 <= x < 2**31),
        ("critic_hidden_dims", "one width a layer, each at least 1", lambda x: len(x) > 0 and min(x) >= 1),
    ):
        for name in names.split():
            if not is_allowed(getattr(args, name)):
                raise BadInput(f"{as_flag(name)} is {getattr(args, name)}, allowed is {allowed}")
    if args.batch_size % args.num_minibatches:
        raise BadInput(
            f"--num-minibatches is {args.num_minibatches}, allowed is a divisor of "
            f"num_steps * num_envs = {args.batch_size}"
        )
    if args.norm_adv and args.batch_size < 2 * args.num_minibatches:
        raise BadInput(
            f"--num-minibatches is {args.num_minibatches}, allowed is at most {args.batch_size // 2}: "
            "advantages are normalized over a minibatch, and one sample has no deviation"
        )
    if args.num_iterations < 1:
        raise BadInput(
            f"--total-timesteps is {args.total_timesteps}, allowed is at least one batch: "
            f"num_steps * num_envs = {args.batch_size}"
        )
    if args.distributed and args.capture_video and args.evaluate is None:
        raise BadInput("--distributed and --capture-video are given, allowed is one of them; film with --evaluate")
    for name in ("coordinator", "num_processes", "process_id"):
        if getattr(args, name) is not None and not args.distributed and args.resume is None and args.evaluate is None:
            raise BadInput(f"{as_flag(name)} is {getattr(args, name)}, which needs --distributed")
    if args.anneal_lr and args.desired_kl is not None:
        raise BadInput("--anneal-lr and --desired-kl are given, allowed is one of them")
    for name in ("export_onnx", "export_npz"):
        path = getattr(args, name)
        if path is None:
            continue
        if args.evaluate is None:
            raise BadInput(f"{as_flag(name)} needs --evaluate RUN, the run to export")
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise BadInput(f"{as_flag(name)} is {path}, allowed is a file in an existing folder")
        if args.temperature > 0:  # or the returns it prints would not be the file's
            raise BadInput(f"--temperature is {args.temperature}, allowed is 0 with {as_flag(name)}: it holds no noise")
    if not issubclass(policy_class, FlowPolicy):
        for name in FLOW_FLAGS:
            if getattr(args, name) != getattr(Args, name):
                raise BadInput(f"{as_flag(name)} is {getattr(args, name)}, but {policy_class.__name__} has no flow")
        if args.export_npz:
            raise BadInput(f"--export-npz is for `numpy_policy`, a flow, and {policy_class.__name__} has none")
    try:
        overrides = json.loads(args.config_overrides)
        if not isinstance(overrides, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise BadInput(f"--config-overrides is {args.config_overrides}, allowed is a JSON object: {error}") from error
    if "impl" in overrides:
        raise BadInput(f"--config-overrides is {args.config_overrides}, allowed is all but impl, which --impl sets")


def check_devices(args: Args) -> None:
    """Raise `BadInput` where there are fewer devices than wanted, or the work cannot be shared evenly."""
    if args.num_devices > jax.local_device_count():
        kind = jax.local_devices()[0].device_kind
        raise BadInput(f"--num-devices is {args.num_devices}, and JAX finds {jax.local_device_count()} here ({kind})")
    devices = args.num_devices * jax.process_count()
    for what, size in (("num_envs", args.num_envs), ("a minibatch", args.batch_size // args.num_minibatches)):
        if size % devices:
            raise BadInput(f"--num-devices: {devices} devices cannot share {what} = {size} evenly")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------------------------------------------------------
# Environment
# ----------------------------------------------------------------------------------------------------------------------

SUITES = (dm_control_suite, locomotion, manipulation)
# Playground's automatic reset replaces no entry of `info` by default, and with --full-reset all but this one.
LAST_STEP = "AutoResetWrapper_preserve_info"


class BrokenSimulationWrapper(wrapper.Wrapper):
    """Ends an episode whose simulation left the finite numbers, with reward 0: one broken environment of thousands must
    neither end a run nor reach its statistics.

    An environment is broken where its reward or any number that it observes is not finite. Its `info` then stays as it
    was before the step: tasks keep averages and histories there, and by default no reset would ever clean them.
    `info["is_broken"]` tells of the last step. Stands around a batch of environments and inside Brax's
    `EpisodeWrapper`, whose sums would keep a NaN.
    """

    def reset(self, rng: jax.Array):
        state = self.env.reset(rng)
        state.info["is_broken"] = jnp.zeros(rng.shape[:-1], bool)
        return state

    def step(self, state, action: jax.Array):
        before, state = state.info, self.env.step(state, action)
        numbers = jax.tree.leaves((state.reward, state.obs))
        is_broken = ~jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in numbers]).all(0)  # (N,)

        def keep_if_broken(old: jax.Array, new: jax.Array) -> jax.Array:
            if new.shape[:1] != is_broken.shape:  # contacts of Warp, which all environments share
                return new
            return jnp.where(is_broken.reshape(-1, *[1] * (new.ndim - 1)), old, new)

        info = {**jax.tree.map(keep_if_broken, before, state.info), "is_broken": is_broken}
        if "_steps" in info:  # a task's own count of steps, which starts anew with the episode
            info["_steps"] = jnp.where(is_broken, 0, info["_steps"])
        return state.replace(
            reward=jnp.where(is_broken, jnp.zeros_like(state.reward), state.reward),
            done=jnp.where(is_broken, jnp.ones_like(state.done), state.done),
            # Of the same type as they were: some tasks count in integers.
            metrics={name: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for name, x in state.metrics.items()},
            info=info,
        )


class LastStepWrapper(wrapper.Wrapper):
    """Keeps what an automatic reset would replace within the same step: the observation that the step really led to,
    whether a time limit or a broken simulation ended the episode, and the sums over the episode.

    Stands between Brax's `EpisodeWrapper` and Playground's automatic reset.
    """

    def reset(self, rng: jax.Array):
        return self.keep(self.env.reset(rng))

    def step(self, state, action: jax.Array):
        return self.keep(self.env.step(state, action))

    def keep(self, state):
        state.info[LAST_STEP] = {
            "obs": state.obs,
            "truncation": state.info["truncation"],
            "is_broken": state.info["is_broken"],
            "episode_metrics": dict(state.info["episode_metrics"]),
            # The first episodes start at random step counts: their returns are no episode's.
            "is_whole": state.info["episode_metrics"]["length"] == state.info["steps"],
        }
        return state


def choose_impl(impl: Optional[str], resume: Optional[str] = None) -> str:
    """The implementation of MuJoCo's physics that `--impl` asks for, or the fastest that works here. A run to `resume`
    has no choice: what one saved of its simulation is of no use to the other."""
    has_warp = importlib.util.find_spec("warp") is not None
    device = jax.devices()[0]
    is_nvidia = "cuda" in device.client.platform_version.lower()  # its kind may be "Tesla T4"
    what, allowed = "--impl is warp", "allowed here is jax"
    if resume is not None:
        what, allowed = f"--resume is {resume}, a run with --impl warp", "here --evaluate works, and a new run"
    if impl == "warp" and not has_warp:
        raise BadInput(f"{what}, which needs `pip install warp-lang`; {allowed}")
    if impl == "warp" and not is_nvidia:
        raise BadInput(f"{what}, which needs an NVIDIA GPU, and JAX runs on {device.device_kind} here; {allowed}")
    return impl or ("warp" if has_warp and is_nvidia else "jax")


def env_name(args: Args) -> str:
    """The environment's name in Playground's registry, after importing the module that a user registers it in."""
    module, _, name = args.env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise BadInput(f"--env-id is {args.env_id}, whose module cannot be imported: {error}") from error
    return name


def env_config(args: Args):
    """The environment's configuration, as overridden."""
    config = registry.get_default_config(env_name(args))
    config.update_from_flattened_dict(json.loads(args.config_overrides))
    return config


def make_env(args: Args):
    """One environment as Playground's registry makes it, without batch and without resets.

    Raises:
        BadInput: for a name that is not in the registry, an environment that cannot be made here (the robots' meshes
            are cloned from the network when they are first needed), or one that observes images.
    """
    name, known = env_name(args), [x for suite in SUITES for x in suite.ALL_ENVS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise BadInput(f"--env-id is {args.env_id}, which Playground does not have; nearest names: {', '.join(near)}")
    overrides = {**json.loads(args.config_overrides), "impl": choose_impl(args.impl)}
    try:
        env = registry.load(name, config_overrides=overrides)
        sizes = env.observation_size
    except Exception as error:
        # Whatever an environment raises while it is built, its user wants the sentence, not the stack.
        raise BadInput(f"--env-id is {args.env_id}, which cannot be made: {' '.join(str(error).split())}") from error
    if jax.process_count() > 1 and env.mjx_model is not None:
        # Playground puts the model on the first process's device, from which no other process can read.
        env._mjx_model = mjx.put_model(env.mj_model, jax.local_devices()[0], impl=overrides["impl"])
    if isinstance(sizes, Mapping) and ("state" not in sizes or any(len(np.atleast_1d(x)) > 1 for x in sizes.values())):
        raise BadInput(
            f"--env-id is {args.env_id}, which observes {dict(sizes)}, allowed are vectors, with one named `state` for "
            "the policy: this script has no image encoder"
        )
    return env


def make_batch(env, args: Args):
    """`num_envs` environments as one, without resets, each with a physics model of its own where that is asked for."""
    if args.domain_randomization:
        randomizer = registry.get_domain_randomizer(env_name(args))
        if randomizer is None:
            raise BadInput(f"--domain-randomization is given, but Playground has no randomizer for {args.env_id}")
        keys = jax.random.split(jax.random.PRNGKey(args.seed), args.num_envs)
        env = wrapper.BraxDomainRandomizationVmapWrapper(env, functools.partial(randomizer, rng=keys))
    else:
        env = VmapWrapper(env)
    return BrokenSimulationWrapper(env)


def make_envs(args: Args):
    """`num_envs` environments as one, which reset themselves within the step that ends an episode.

    `state.obs` is then the next episode's first observation, and `state.info[LAST_STEP]` tells of the step itself.
    """
    env, config = make_env(args), env_config(args)
    env = EpisodeWrapper(make_batch(env, args), config.episode_length, config.get("action_repeat", 1))
    return wrapper.BraxAutoResetWrapper(LastStepWrapper(env), full_reset=args.full_reset)


def as_dict(obs) -> dict[str, jax.Array]:
    """An observation of any environment: `state` for the policy, and where there is one `privileged_state`, which only
    the critic sees and a robot does not have."""
    if not isinstance(obs, Mapping):
        return {"state": obs}
    return {name: obs[name] for name in ("state", "privileged_state") if name in obs}


class RunningMeanStd(NamedTuple):
    """Mean and variance of a stream. Starts as one weak unit sample."""

    count: jax.Array  # ()
    mean: jax.Array  # (*shape)
    var: jax.Array  # (*shape)

    @classmethod
    def create(cls, shape: tuple = ()) -> "RunningMeanStd":
        return cls(jnp.asarray(1e-4), jnp.zeros(shape), jnp.ones(shape))

    def update(self, batch: jax.Array) -> "RunningMeanStd":
        """Merge in a batch (..., *shape) by the parallel form of Welford's algorithm."""
        axes = tuple(range(batch.ndim - self.mean.ndim))
        size = math.prod(batch.shape[: len(axes)])
        mean, var = batch.mean(axes), batch.var(axes)
        count, distance = self.count + size, mean - self.mean
        share = size / count
        return RunningMeanStd(
            count, self.mean + share * distance, self.var + share * (var - self.var + (1 - share) * distance**2)
        )

    @property
    def std(self) -> jax.Array:
        return jnp.sqrt(self.var + 1e-8)


def normalize_obs(stats: RunningMeanStd, obs: jax.Array) -> jax.Array:
    """Observations (..., obs_dim) with zero mean and unit variance, clipped to +-10."""
    return ((obs - stats.mean) / stats.std).clip(-10, 10)


# ----------------------------------------------------------------------------------------------------------------------
# Flow policy and critic
# ----------------------------------------------------------------------------------------------------------------------


def orthogonal(gain: float = 2**0.5) -> Callable:
    """Initializer, orthogonal as in the PyTorch scripts; also of the empty matrices of one-dimensional actions."""
    init = nn.initializers.orthogonal(gain)
    return lambda key, shape, dtype=None: init(key, shape) if math.prod(shape) else jnp.zeros(shape)


class CouplingLayer(nn.Module):
    """The networks s_j and t_j of one coupling layer f_j (Eq. 6): two halves of one output.

    The observation's part of the first matrix product is done by `FlowPolicy` for all layers at once and comes in as
    `obs_features`; adding it here makes the sum the product with [observation, kept part], as in the paper.
    """

    obs_dim: int
    kept_dim: int
    transformed_dim: int
    hidden_dim: int
    hidden_layers: int
    scale_fn: str
    scale_bound: float
    activation: Callable

    def setup(self):
        self.kernel = self.param("kernel", orthogonal(), (self.obs_dim + self.kept_dim, self.hidden_dim))
        self.bias = self.param("bias", nn.initializers.zeros, (self.hidden_dim,))
        self.hidden = [nn.Dense(self.hidden_dim, kernel_init=orthogonal()) for _ in range(self.hidden_layers - 1)]
        # A small output: at first every f_j is nearly the identity, and pi nearly N(0, I).
        self.out = nn.Dense(2 * self.transformed_dim, kernel_init=orthogonal(0.01))

    def __call__(self, obs_features: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features (B, hidden_dim) and kept part (B, |d|) to bounded log-scale and shift, each (B, D - |d|)."""
        hidden = self.activation(obs_features + kept @ self.kernel[self.obs_dim :])
        for layer in self.hidden:
            hidden = self.activation(layer(hidden))
        scale, shift = jnp.split(self.out(hidden), 2, axis=-1)
        return self.bound(scale), shift

    def bound(self, scale: jax.Array) -> jax.Array:
        """The paper's one trick, and the variants it is compared with (Sec. 4, Fig. 2)."""
        if self.scale_fn == "tanh":
            return self.scale_bound * jnp.tanh(scale)
        if self.scale_fn == "clip":
            return scale.clip(-self.scale_bound, self.scale_bound)
        if self.scale_fn == "none":
            return scale
        if self.scale_fn == "zero":
            return jnp.zeros_like(scale)
        # Andrade (2024): growth is bounded much tighter than shrinkage.
        alpha = jnp.where(scale >= 0, 0.1, 2.0)
        return (2 / jnp.pi) * alpha * jnp.arctan(scale / alpha)


class FlowPolicy(nn.Module):
    """A conditional RealNVP as a policy (Eq. 6, Sec. A.7). Needs nothing from the rest of this file but the above.

    Use: `variables = policy.init(key, obs, action)`, then `policy.apply(variables, obs, action, method="log_prob")`.

    Attributes:
        obs_dim: size of an observation.
        action_dim: size D of an action, at least 1.
        hidden_dim, hidden_layers: width and depth of each coupling network.
        num_layers: coupling layers K. Even-indexed dimensions are kept in the first, odd-indexed in the second, ...
        scale_bound: the bound l.
        scale_fn: "tanh" (the paper's), "clip", "none", "zero" or "asymmetric".
        learned_base_std: give the base distribution N(0, diag(sigma^2)) a learned sigma instead of 1.
        activation: of the coupling networks; ELU on Playground, tanh in the script for Gymnasium.
    """

    obs_dim: int
    action_dim: int
    hidden_dim: int = 64
    num_layers: int = 4
    scale_bound: float = 0.5
    scale_fn: str = "tanh"
    hidden_layers: int = 1
    learned_base_std: bool = False
    activation: Callable = nn.elu

    def setup(self):
        even_dim, odd_dim = (self.action_dim + 1) // 2, self.action_dim // 2
        self.layers = [
            CouplingLayer(
                self.obs_dim,
                *((even_dim, odd_dim) if j % 2 == 0 else (odd_dim, even_dim)),
                self.hidden_dim,
                self.hidden_layers,
                self.scale_fn,
                self.scale_bound,
                self.activation,
            )
            for j in range(self.num_layers)
        ]
        if self.learned_base_std:
            self.base_log_std = self.param("base_log_std", nn.initializers.zeros, (self.action_dim,))
        else:
            self.base_log_std = jnp.zeros(self.action_dim)

    def __call__(self, obs: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f of the paper: actions (B, D) to latents (B, D) and log|det dz/da| (B,)."""
        z, log_scales = self.transform(obs, action)
        return z, sum(log_scale.sum(-1) for log_scale in log_scales)  # each Jacobian is triangular

    forward = __call__

    def log_prob(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        """log pi(a|o) = log N(f(a; o); 0, I) + sum_j sum l*tanh(s_j) (Eq. 6). (B, obs_dim), (B, D) -> (B,)."""
        z, log_det = self(obs, action)
        return self.base_log_prob(z) + log_det

    def sample(self, obs: jax.Array, key: jax.Array, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
        """Draw actions (Algorithm 1, lines 4-6). (B, obs_dim) -> actions (B, D), log-probabilities (B,).

        `temperature` multiplies the standard deviation of the base noise, and 0 gives the deterministic policy
        (Sec. A.6). The log-probability is always that of the policy at temperature 1.
        """
        noise = jax.random.normal(key, (*obs.shape[:-1], self.action_dim))
        z = temperature * jnp.exp(self.base_log_std) * noise
        action, log_det = self.inverse(obs, z)
        return action, self.base_log_prob(z) - log_det

    def mode(self, obs: jax.Array) -> jax.Array:
        """The deterministic policy, `sample` at temperature 0 without a key. (B, obs_dim) -> (B, D)."""
        return self.inverse(obs, jnp.zeros((*obs.shape[:-1], self.action_dim)))[0]

    def base_log_prob(self, z: jax.Array) -> jax.Array:
        """log N(z; 0, diag(sigma^2)), with sigma = 1 unless it is learned. (B, D) -> (B,)."""
        z = z * jnp.exp(-self.base_log_std)
        log_normalizer = 0.5 * self.action_dim * math.log(2 * math.pi) + self.base_log_std.sum()
        return -0.5 * jnp.square(z).sum(-1) - log_normalizer

    def obs_features(self, obs: jax.Array) -> list[jax.Array]:
        """The observation's part of the first matrix product of each layer, (B, obs_dim) to K of (B, hidden_dim)."""
        # The observation is the same in every layer, so these K products are one.
        kernel = jnp.concatenate([layer.kernel[: self.obs_dim] for layer in self.layers], axis=1)
        bias = jnp.concatenate([layer.bias for layer in self.layers])
        return jnp.split(obs @ kernel + bias, self.num_layers, axis=-1)

    def transform(self, obs: jax.Array, action: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """f of the paper, with every layer's log-scale: actions (B, D) to latents (B, D) and K of (B, D - |d|)."""
        kept, other = action[..., 0::2], action[..., 1::2]
        log_scales = []
        for layer, features in zip(self.layers, self.obs_features(obs)):
            log_scale, shift = layer(features, kept)
            other = other * jnp.exp(log_scale) + shift  # Eq. 6
            log_scales.append(log_scale)
            kept, other = other, kept
        even, odd = (other, kept) if self.num_layers % 2 else (kept, other)
        return self.merge(even, odd), log_scales

    def inverse(self, obs: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """f^-1 of the paper, last layer first: latents (B, D) to actions (B, D) and log|det da/dz| (B,)."""
        kept, other = z[..., 0::2], z[..., 1::2]
        if self.num_layers % 2:
            kept, other = other, kept
        log_det = jnp.zeros(z.shape[:-1])
        for layer, features in zip(reversed(self.layers), reversed(self.obs_features(obs))):
            kept, other = other, kept
            log_scale, shift = layer(features, kept)
            other = (other - shift) * jnp.exp(-log_scale)
            log_det = log_det - log_scale.sum(-1)
        return self.merge(kept, other), log_det

    def merge(self, even: jax.Array, odd: jax.Array) -> jax.Array:
        """Undo the split: even- and odd-indexed dimensions to (B, D) in their own order."""
        order = np.arange(self.action_dim)
        return jnp.concatenate((even, odd), axis=-1)[..., order // 2 + (order % 2) * even.shape[-1]]

    def diagnostics(self, obs: jax.Array, action: jax.Array) -> dict[str, jax.Array]:
        """What the paper diagnoses instability with (Fig. 2): log-determinant, size and saturation of the scales."""
        _, log_scales = self.transform(obs, action)
        size = jnp.abs(jnp.concatenate(log_scales, axis=-1))
        found = {
            "flow/log_det": sum(log_scale.sum(-1) for log_scale in log_scales).mean(),
            "flow/scale_abs_mean": size.mean(),
        }
        if self.scale_fn in ("tanh", "clip"):  # the others are not bounded by l
            found["flow/scale_saturation"] = (size > 0.95 * self.scale_bound).mean()
        return found


class Critic(nn.Module):
    """The value function V(o): an ELU network, (B, obs_dim) -> (B,)."""

    hidden_dims: tuple[int, ...] = (512, 256, 128)

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        for width in self.hidden_dims:
            obs = nn.elu(nn.Dense(width, kernel_init=orthogonal())(obs))
        return nn.Dense(1, kernel_init=orthogonal(1.0))(obs)[..., 0]


def make_policy(policy_class: type, obs_dim: int, action_dim: int, args: Args) -> nn.Module:
    """`policy_class(obs_dim, action_dim)`; flows also get their flags."""
    if not issubclass(policy_class, FlowPolicy):
        return policy_class(obs_dim, action_dim)
    flags = {name: getattr(args, name) for name in FLOW_FLAGS}
    return policy_class(obs_dim, action_dim, num_layers=flags.pop("num_flow_layers"), **flags)


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ----------------------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class TrainState:
    """Everything that the next iteration depends on."""

    params: dict  # "policy" and "critic"
    opt_state: Any
    learning_rate: jax.Array  # ()
    obs_stats: dict[str, RunningMeanStd]  # one for each part of the observation
    reward_stats: RunningMeanStd  # of the discounted return
    discounted_return: jax.Array  # (N,)
    env_state: Any  # leaves (N, ...), but for contacts of Warp, which all environments share
    key: jax.Array


class Rollout(NamedTuple):
    """The buffer B of Algorithm 1: T steps of N environments."""

    obs: dict[str, jax.Array]  # (T, N, obs_dim) each, normalized
    actions: jax.Array  # (T, N, action_dim), as sampled: the environment received them clipped to [-1, 1]
    log_probs: jax.Array  # (T, N)
    rewards: jax.Array  # (T, N), normalized
    values: jax.Array  # (T, N)
    next_values: jax.Array  # (T, N), of the state that really followed
    terminated: jax.Array  # (T, N)
    done: jax.Array  # (T, N), terminated or truncated


class Learner(NamedTuple):
    """What an iteration uses and does not change."""

    args: Args
    envs: Any
    policy: nn.Module
    critic: nn.Module
    optimizer: optax.GradientTransformation


def init_state(learner: Learner, seed: int) -> TrainState:
    """New networks, new statistics, new episodes."""
    args = learner.args
    key, policy_key, critic_key, env_key, steps_key = jax.random.split(jax.random.PRNGKey(seed), 5)
    env_state = learner.envs.reset(jax.random.split(env_key, args.num_envs))
    if args.random_initial_steps:
        limit = episode_length(learner.envs)
        steps = jax.random.randint(steps_key, (args.num_envs,), 0, limit)
        for name in ("steps", "_steps"):  # the second where a task counts too, and starts anew when it is at the limit
            if name in env_state.info:
                env_state.info[name] = steps.astype(env_state.info[name].dtype)
    obs = as_dict(env_state.obs)
    action = jnp.zeros((args.num_envs, learner.envs.action_size))
    params = {
        "policy": learner.policy.init(policy_key, obs["state"], action)["params"],
        "critic": learner.critic.init(critic_key, critic_obs(obs))["params"],
    }
    return TrainState(
        params=params,
        opt_state=learner.optimizer.init(params),
        learning_rate=jnp.asarray(args.learning_rate),
        obs_stats={name: RunningMeanStd.create(x.shape[1:]) for name, x in obs.items()},
        reward_stats=RunningMeanStd.create(),
        discounted_return=jnp.zeros(args.num_envs),
        env_state=env_state,
        key=key,
    )


def episode_length(envs) -> int:
    """The time limit of environments from `make_envs`, in steps."""
    return envs.env.env.episode_length  # automatic reset -> LastStepWrapper -> EpisodeWrapper


def critic_obs(obs: dict[str, jax.Array]) -> jax.Array:
    """What the critic sees: the privileged state where there is one."""
    return obs.get("privileged_state", obs["state"])


def train_iteration(learner: Learner, state: TrainState) -> tuple[TrainState, dict[str, jax.Array]]:
    """One iteration of Algorithm 1's outer loop, and its metrics."""
    state, rollout, metrics = collect_rollout(learner, state)
    state, losses = ppo_update(learner, state, rollout)
    metrics |= losses
    if hasattr(learner.policy, "diagnostics"):  # on every eighth environment: enough for a mean
        obs, actions = rollout.obs["state"][:, ::8], rollout.actions[:, ::8]
        metrics |= learner.policy.apply({"params": state.params["policy"]}, obs, actions, method="diagnostics")
    is_finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]).all()
    return state, {**metrics, "charts/learning_rate": state.learning_rate, "is_finite": is_finite}


def collect_rollout(learner: Learner, state: TrainState) -> tuple[TrainState, Rollout, dict[str, jax.Array]]:
    """Algorithm 1, lines 2-9. Returns the state with new statistics, the buffer, and how the episodes went."""
    args, policy, critic, envs = learner.args, learner.policy, learner.critic, learner.envs
    key, rollout_key = jax.random.split(state.key)

    def step(carry, key):
        env_state, discounted_return = carry
        obs = as_dict(env_state.obs)
        inputs = normalize_obs(state.obs_stats["state"], obs["state"])
        action, log_prob = policy.apply({"params": state.params["policy"]}, inputs, key, method="sample")  # lines 4-6
        env_state = envs.step(env_state, action.clip(-1, 1))  # line 7
        last, done = env_state.info[LAST_STEP], env_state.done
        discounted_return = args.gamma * discounted_return + env_state.reward
        transition = {
            "obs": obs,
            "next_obs": critic_obs(as_dict(last["obs"])),
            "action": action,
            "log_prob": log_prob,
            "reward": env_state.reward,
            "discounted_return": discounted_return,
            "terminated": done * (1 - last["truncation"]),
            "done": done,
            "is_whole_episode": done * last["is_whole"],
            "is_broken": last["is_broken"],
            "episode_metrics": last["episode_metrics"],
        }
        # The discounted return starts anew after an episode's last reward, be the end a termination or a time limit.
        return (env_state, discounted_return * (1 - done)), transition

    keys = jax.random.split(rollout_key, args.num_steps)
    carry = (state.env_state, state.discounted_return)
    (env_state, discounted_return), steps = jax.lax.scan(step, carry, keys)

    # All observations of a rollout are normalized as those were that the policy acted on; rewards may use what is new.
    obs = {name: normalize_obs(state.obs_stats[name], x) for name, x in steps["obs"].items()}
    next_obs = normalize_obs(critic_obs(state.obs_stats), steps["next_obs"])
    reward_stats = state.reward_stats.update(steps["discounted_return"])
    critic_params = {"params": state.params["critic"]}
    rollout = Rollout(
        obs,
        steps["action"],
        steps["log_prob"],
        (steps["reward"] / reward_stats.std).clip(-10, 10),
        critic.apply(critic_params, critic_obs(obs)),
        critic.apply(critic_params, next_obs),
        steps["terminated"],
        steps["done"],
    )
    whole = steps["is_whole_episode"]
    means = {name: (x * whole).sum() / whole.sum() for name, x in steps["episode_metrics"].items()}  # nan without any
    metrics = {
        "charts/episodic_return": means.pop("sum_reward"),
        "charts/episodic_length": means.pop("length"),
        "charts/episodes": whole.sum(),
        "charts/reward": steps["reward"].mean(),
        "charts/broken_environments": steps["is_broken"].sum(),
        **{f"episode/{name}": mean for name, mean in means.items()},
    }
    state = state.replace(
        env_state=env_state,
        discounted_return=discounted_return,
        obs_stats={name: state.obs_stats[name].update(x) for name, x in steps["obs"].items()},
        reward_stats=reward_stats,
        key=key,
    )
    return state, rollout, metrics


def compute_gae(rewards, values, next_values, terminated, done, gamma: float, gae_lambda: float) -> jax.Array:
    """Generalized advantage estimation (Algorithm 1, line 10; Schulman et al. 2016, Eq. 16). All (T, N).

    Args:
        next_values: value of the state that really followed, the final observation's where an episode ended.
        terminated: 0/1 or bool, the state had no future: no bootstrap. A time limit is not a termination.
        done: 0/1 or bool, terminated or truncated: the next row is another episode, so the trace is cut.
    """
    # Chosen and not multiplied by 0: where a simulation broke and the episode was ended for it, the value may be NaN.
    deltas = rewards + gamma * jnp.where(terminated > 0, 0.0, next_values) - values
    decays = gamma * gae_lambda * (1 - done)

    def step(last, now):
        delta, decay = now
        last = delta + decay * last
        return last, last

    return jax.lax.scan(step, jnp.zeros_like(values[0]), (deltas, decays), reverse=True)[1]


class Batch(NamedTuple):
    """Transitions of a rollout, shuffled: (B, ...) each."""

    obs: dict[str, jax.Array]
    actions: jax.Array
    log_probs: jax.Array
    advantages: jax.Array
    returns: jax.Array
    values: jax.Array


def minibatch_loss(params: dict, learner: Learner, minibatch: Batch, key: jax.Array):
    """The function `update` of Algorithm 1, lines 19-23, on a minibatch of B. Returns the scalar loss and metrics."""
    args, policy = learner.args, {"params": params["policy"]}
    obs = minibatch.obs["state"]
    log_ratio = learner.policy.apply(policy, obs, minibatch.actions, method="log_prob") - minibatch.log_probs
    ratio = jnp.exp(log_ratio)  # r(theta), line 22
    advantages = minibatch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    clipped_ratio = ratio.clip(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantages, clipped_ratio * advantages).mean()  # Eq. 2, line 23

    values = learner.critic.apply({"params": params["critic"]}, critic_obs(minibatch.obs))
    errors = jnp.square(values - minibatch.returns)
    if args.clip_vloss:
        clipped_values = minibatch.values + (values - minibatch.values).clip(-args.clip_coef, args.clip_coef)
        errors = jnp.maximum(errors, jnp.square(clipped_values - minibatch.returns))
    value_loss = 0.5 * errors.mean()

    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef > 0:
        # No closed form: -E[log pi(a)] over samples of the current policy, differentiated through the samples.
        loss = loss + args.ent_coef * learner.policy.apply(policy, obs, key, method="sample")[1].mean()
    return loss, {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/old_approx_kl": -log_ratio.mean(),
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # Schulman, joschu.net/blog/kl-approx.html
        "losses/clipfrac": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }


def ppo_update(learner: Learner, state: TrainState, rollout: Rollout) -> tuple[TrainState, dict[str, jax.Array]]:
    """Algorithm 1, lines 10-17: N epochs of M minibatches."""
    args = learner.args
    advantages = compute_gae(*rollout[3:], args.gamma, args.gae_lambda)  # from rewards on
    returns = advantages + rollout.values
    key, noise_key, *epoch_keys = jax.random.split(state.key, 2 + args.update_epochs)
    actions, old_log_probs = rollout.actions, rollout.log_probs
    if args.action_noise > 0:  # Sec. 5.1; the ratio compares both policies at the same, noisy action
        actions = actions + args.action_noise * jax.random.normal(noise_key, actions.shape)
        policy = {"params": state.params["policy"]}
        old_log_probs = learner.policy.apply(policy, rollout.obs["state"], actions, method="log_prob")
    batch = Batch(rollout.obs, actions, old_log_probs, advantages, returns, rollout.values)
    batch = jax.tree.map(lambda x: x.reshape(args.batch_size, *x.shape[2:]), batch)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(args.num_minibatches, -1, *x.shape[1:])
        if args.num_devices > 1 or args.distributed:  # every device takes its share of every minibatch
            x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, "envs"))
        return x

    def epoch(carry, key):
        shuffle_key, loss_key = jax.random.split(key)
        permutation = jax.random.permutation(shuffle_key, args.batch_size)
        minibatches = jax.tree.map(lambda x: split(x[permutation]), batch)
        return jax.lax.scan(step, carry, (minibatches, jax.random.split(loss_key, args.num_minibatches)))

    def step(carry, now):
        params, opt_state, learning_rate = carry
        gradient, metrics = jax.grad(minibatch_loss, has_aux=True)(params, learner, *now)
        direction, opt_state = learner.optimizer.update(gradient, opt_state)
        if args.desired_kl is not None:  # rsl_rl's rule
            kl = metrics["losses/approx_kl"]
            factor = jnp.where(kl > 2 * args.desired_kl, 1 / 1.5, jnp.where(kl < args.desired_kl / 2, 1.5, 1.0))
            learning_rate = (learning_rate * factor).clip(1e-5, 1e-2)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, params, direction)  # line 24
        return (params, opt_state, learning_rate), {**metrics, "losses/grad_norm": optax.tree.norm(gradient)}

    carry = (state.params, state.opt_state, state.learning_rate)
    (params, opt_state, learning_rate), metrics = jax.lax.scan(epoch, carry, jnp.stack(epoch_keys))
    means = ("losses/clipfrac", "losses/grad_norm")  # of the others the last minibatch's, as CleanRL has it
    metrics = {name: x.mean() if name in means else x[-1, -1] for name, x in metrics.items()}
    metrics["losses/entropy"] = -rollout.log_probs.mean()  # of the policy that acted, from its own samples
    metrics["losses/explained_variance"] = 1 - (returns - rollout.values).var() / (returns.var() + 1e-8)
    return state.replace(params=params, opt_state=opt_state, learning_rate=learning_rate, key=key), metrics


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def saved_iterations(run_dir: str | Path) -> list[int]:
    """Iterations of a run's whole checkpoints; what orbax had not finished writing is none."""
    return sorted(ocp.utils.checkpoint_steps(Path(run_dir).absolute() / "checkpoint"))


def checkpoint_manager(run_dir: Path, keep_interval: Optional[int] = None) -> ocp.CheckpointManager:
    """orbax's manager of a run's checkpoints: written to a temporary folder, renamed when whole. Kept are the newest,
    those of every `keep_interval` iterations, and all that a session before this one kept."""
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(1), policies.CustomSteps(saved_iterations(run_dir)[:-1])]
    if keep_interval is not None:
        kept.append(policies.EveryNSteps(keep_interval))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept), enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(Path(run_dir).absolute() / "checkpoint", options=options)


def run_and_iteration(path: str | Path) -> tuple[Path, Optional[int]]:
    """A run's folder, and which of its checkpoints `path` names: runs/RUN/checkpoint/500, or None for the newest."""
    path = Path(path)
    if path.parent.name == "checkpoint" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def save_checkpoint(manager: ocp.CheckpointManager, iteration: int, state: TrainState, meta: dict) -> None:
    """Write atomically: whoever reads the folder, whenever, finds a whole checkpoint. Called by every process."""
    policy = (state.params["policy"], state.obs_stats["state"])  # a second time, for whoever wants to act only
    items = {"policy": ocp.args.StandardSave(as_leaves(policy)), "state": ocp.args.StandardSave(as_leaves(state))}
    manager.save(iteration, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)), force=True)


def as_leaves(tree: Any) -> dict[str, Any]:
    """A tree by the numbers of its leaves, without the empty ones, which orbax refuses: one-dimensional actions leave
    some in the flow, and simulators have many."""
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree)) if math.prod(leaf.shape)}


def restore(path: str | Path, item: str, template: Any, shardings: Any) -> Any:
    """An item of a run's newest checkpoint, or of the one that `path` names. Shapes are the template's; `shardings`
    need not be those of the saved run.

    Raises:
        ValueError: where shapes differ.
    """
    wanted = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), template, shardings)
    run_dir, iteration = run_and_iteration(path)
    with checkpoint_manager(run_dir) as manager:
        items = {item: ocp.args.StandardRestore(as_leaves(wanted))}
        saved = manager.restore(iteration, args=ocp.args.Composite(**items))[item]
    leaves, structure = jax.tree.flatten(wanted)
    for i, leaf in enumerate(leaves):
        empty = jax.jit(functools.partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=leaf.sharding)
        leaves[i] = saved[str(i)] if str(i) in saved else empty()
    return jax.tree.unflatten(structure, leaves)


def load_checkpoint(path: str | Path, policy_class: Optional[type] = None, flag: str = "--evaluate") -> dict:
    """Read what describes a run's newest checkpoint, or the one that `path` names: its arguments, iteration and steps.

    Raises:
        BadInput: naming `flag`, if there is none, it cannot be read, or it holds another class than `policy_class`.
    """
    run_dir, iteration = run_and_iteration(path)
    if not (run_dir / "checkpoint" / str(iteration or "")).is_dir():
        raise BadInput(f"{flag} is {path}, which holds no checkpoint; allowed is a run folder")
    try:
        with checkpoint_manager(run_dir) as manager:
            meta = manager.restore(iteration, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        found = meta["policy_class"]
    except Exception as error:
        # orbax raises many kinds of errors for a folder that was cut short or is not its own.
        raise BadInput(f"{flag} is {path}, whose checkpoint is incomplete or not of this script") from error
    if policy_class is not None and found != policy_class.__name__:
        raise BadInput(f"{flag} is {path}, which holds a {found}; this script trains {policy_class.__name__}")
    return meta


def event_files(run_dir: Path) -> dict[str, int]:
    """TensorBoard's files in a run folder, with their sizes."""
    return {file.name: file.stat().st_size for file in sorted(run_dir.glob("events.out.tfevents.*"))}


def cut_event_files(run_dir: Path, sizes: dict[str, int]) -> None:
    """Take the events back to a checkpoint, so that what is computed again is logged once."""
    for name in event_files(run_dir):
        if name in sizes:
            os.truncate(run_dir / name, sizes[name])
        else:
            (run_dir / name).unlink()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and export
# ----------------------------------------------------------------------------------------------------------------------


class DeployedPolicy(NamedTuple):
    """What a robot runs: raw observations (B, obs_dim) in, actions (B, action_dim) clipped to [-1, 1] out."""

    policy: nn.Module
    params: dict
    obs_stats: RunningMeanStd

    def act(self, obs: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
        inputs = normalize_obs(self.obs_stats, obs)
        action, _ = self.policy.apply({"params": self.params}, inputs, key, temperature, method="sample")
        return action.clip(-1, 1)

    def unclipped(self, obs: jax.Array) -> jax.Array:
        """The deterministic policy's actions as the flow gives them, of any size."""
        inputs = normalize_obs(self.obs_stats, obs)
        return self.policy.apply({"params": self.params}, inputs, method="mode")

    def __call__(self, obs: jax.Array) -> jax.Array:
        """The deterministic policy."""
        return self.unclipped(obs).clip(-1, 1)


def evaluate(
    checkpoint: str | Path,
    policy_class: type = FlowPolicy,
    eval_episodes: int = 10,
    temperature: float = 0.0,
    seed: int = 1,
    capture_video: bool = False,
    export_onnx: Optional[str] = None,
    export_npz: Optional[str] = None,
    impl: Optional[str] = None,
    domain_randomization: bool = False,
    config_overrides: Optional[str] = None,
) -> list[float]:
    """Play a trained policy with its observation statistics frozen, print how it went, and return the undiscounted
    episode returns. All episodes are played at once, each in an environment of its own.

    Args:
        checkpoint: run folder, or one of its checkpoints, as runs/RUN/checkpoint/500.
        policy_class: class that the checkpoint was trained with.
        temperature: factor on the standard deviation of the base noise; 0 is the deterministic policy.
        seed: of the environments and the noise; the same seed gives the same returns.
        capture_video: film every episode into the run's folder `videos`.
        export_onnx, export_npz: files to write the deterministic policy to.
        impl: implementation of the physics, by default the fastest that works here, be it another than in training.
        domain_randomization: give every episode a physics model of its own, be it so in training or not.
        config_overrides: changes to the environment's configuration, as JSON, by default those of training.

    Raises:
        BadInput: for a checkpoint that is missing, incomplete or of another policy.
        WrongExport: where an exported file does not act as the policy does; by then the returns are printed.
    """
    meta = load_checkpoint(checkpoint, policy_class)
    args = from_json(meta["args"])
    args = dataclasses.replace(
        args,
        impl=impl,
        seed=seed,
        num_envs=eval_episodes,
        domain_randomization=domain_randomization,
        config_overrides=args.config_overrides if config_overrides is None else config_overrides,
    )
    env, config = make_env(args), env_config(args)
    envs = make_batch(env, args)
    num_steps, repeat = config.episode_length, config.get("action_repeat", 1)
    deployed = restore_policy(checkpoint, policy_class, args, env)
    act = jax.vmap(lambda obs, key: deployed.act(obs[None], key, temperature)[0])

    @jax.jit
    def play(reset_keys: jax.Array, keys: jax.Array):
        """What broke, and of each step: observation, reward, whether the episode was going on, and frame for a film."""

        def step(carry, keys):
            state, alive, broken = carry
            obs, was_alive, reward = as_dict(state.obs)["state"], alive, 0.0
            frame = {name: getattr(state.data, name) for name in FRAME} if capture_video else {}
            action = act(obs, keys)
            for _ in range(repeat):
                state = envs.step(state, action)
                reward = reward + jnp.where(alive, state.reward, 0.0)
                broken = broken | (alive & state.info["is_broken"])
                alive = alive & (state.done == 0)
            return (state, alive, broken), (obs, reward, was_alive, frame)

        alive = jnp.ones(eval_episodes, bool)
        (_, _, broken), steps = jax.lax.scan(step, (envs.reset(reset_keys), alive, ~alive), keys)
        return broken, steps

    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.PRNGKey(seed), eval_episodes))
    step_keys = jax.vmap(lambda key: jax.random.split(key, -(-num_steps // repeat)), out_axes=1)(keys[:, 1])
    broken, (obs, rewards, alive, frames) = play(keys[:, 0], step_keys)  # steps: (T, episodes, ...)
    returns, alive = np.asarray(rewards.sum(0)), np.asarray(alive)
    print(
        f"{eval_episodes} episodes of {args.env_id} at temperature {temperature:g}: "
        f"return {returns.mean():.1f} ± {returns.std():.1f}",
        flush=True,
    )
    if broken.any():
        print(f"{broken.sum()} of them ended early, since their simulation left the finite numbers.", flush=True)
    if capture_video and can_render(args.env_id, env):
        prefix = f"eval-step{meta['global_step']}-temperature{temperature:g}"
        film(env, frames, alive, env.dt * repeat, run_and_iteration(checkpoint)[0] / "videos", prefix)
    seen = np.asarray(obs)[alive][:256]  # finite: a broken simulation's end the episode
    if export_onnx:
        to_onnx(deployed, export_onnx, seen, about_robot(args, env))
    if export_npz:
        to_npz(deployed, export_npz, seen, about_robot(args, env))
    return returns.tolist()


def restore_policy(path: str | Path, policy_class: type, args: Args, env) -> DeployedPolicy:
    """The policy of a run's newest checkpoint, or of the one that `path` names. `env` tells the sizes."""
    obs_dim = as_dict(jax.eval_shape(env.reset, jax.random.PRNGKey(0)).obs)["state"].shape[-1]
    policy = make_policy(policy_class, obs_dim, env.action_size, args)

    def initialize():
        obs, action = jnp.zeros((1, obs_dim)), jnp.zeros((1, env.action_size))
        return policy.init(jax.random.PRNGKey(0), obs, action)["params"], RunningMeanStd.create((obs_dim,))

    template, here = jax.eval_shape(initialize), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        params, obs_stats = restore(path, "policy", template, jax.tree.map(lambda _: here, template))
    except ValueError as error:
        raise BadInput(f"--evaluate is {path}, whose {policy_class.__name__} does not fit {args.env_id}") from error
    return DeployedPolicy(policy, params, obs_stats)


FRAME = ("qpos", "qvel", "mocap_pos", "mocap_quat", "xfrc_applied")  # what Playground's `render` reads


def can_render(env_id: str, env) -> bool:
    """Whether frames of the environment can be drawn here; prints one line that says what to install if not."""
    try:
        import moviepy  # noqa: F401

        state = env.reset(jax.random.PRNGKey(0))
        env.render([state], height=48, width=64)
        return True
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        print(
            f"--capture-video: cannot draw {env_id} here ({reason}); on Debian `apt-get install libegl1` and set "
            "MUJOCO_GL=egl. Going on without video.",
            file=sys.stderr,
        )
        return False


def film(env, frames: dict[str, jax.Array], alive: np.ndarray, dt: float, folder: Path, prefix: str) -> None:
    """Write each episode, frames (T, episodes, ...) of `dt` seconds each, as a film that plays in real time."""
    from moviepy import ImageSequenceClip

    folder.mkdir(exist_ok=True)
    frames = jax.tree.map(np.asarray, frames)
    every = max(1, round(1 / (30 * dt)))  # about 30 images a second
    camera = 0 if env.mj_model.ncam else None
    for episode, length in enumerate(alive.sum(0)):
        states = [
            SimpleNamespace(data=SimpleNamespace(**{name: x[t, episode] for name, x in frames.items()}))
            for t in range(0, length, every)
        ]
        # Playground draws a progress bar, which is for terminals.
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            images = env.render(states, camera=camera)
        path = folder / f"{prefix}-episode-{episode}.mp4"
        ImageSequenceClip(images, fps=1 / (dt * every)).write_videofile(str(path), logger=None)
    print(f"Films of {alive.shape[1]} episodes are in {folder}")


class WrongExport(RuntimeError):
    """An exported file computes something else than the policy; `main` prints it as one line, exit status 1."""


def about_robot(args: Args, env) -> dict[str, Any]:
    """What a robot's program has to know beside the policy: the task, the seconds between two actions and, where the
    task has them, the factor on its actions and the pose of the joints that they are added to."""
    config = env_config(args)
    about = {"env_id": args.env_id, "ctrl_dt": env.dt * config.get("action_repeat", 1)}
    if "action_scale" in config:
        about["action_scale"] = config.action_scale
    if hasattr(env, "_default_pose"):  # the name in Playground's tasks of legged robots and hands
        about["default_pose"] = env._default_pose
    return about


def to_onnx(deployed: DeployedPolicy, path: str, obs: np.ndarray, about: Mapping[str, Any]) -> float:
    """Write `deployed` as ONNX, float32 (batch, obs_dim) to float32 (batch, action_dim), and compare both on `obs`.

    The names of input and output are those that Playground's own controllers for robots ask for. `about` becomes the
    file's metadata: text as it is, numbers as JSON.

    Returns the largest difference, of actions above 1 as a share of them. Raises `WrongExport` if it is above 1e-5:
    such a file must not reach a robot.
    """
    import jax2onnx
    import onnx
    import onnxruntime

    temporary = path + ".tmp"
    jax2onnx.to_onnx(
        lambda obs: deployed(obs),
        inputs=[("batch", obs.shape[1])],
        input_names=["obs"],
        output_names=["continuous_actions"],
        return_mode="file",
        output_path=temporary,
    )
    model = onnx.load(temporary)
    as_text = {name: x if isinstance(x, str) else json.dumps(np.asarray(x).tolist()) for name, x in about.items()}
    onnx.helper.set_model_props(model, as_text)
    onnx.save(model, temporary)
    session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
    return keep_if_same(temporary, path, session.run(None, {"obs": obs})[0], deployed, obs)


def to_npz(deployed: DeployedPolicy, path: str, obs: np.ndarray, about: Mapping[str, Any]) -> float:
    """Write weights, statistics and `about` as plain arrays for `numpy_policy`, and compare both policies on `obs`.

    Returns the largest difference, of actions above 1 as a share of them. Raises `WrongExport` if it is above 1e-5.
    """
    policy, params = deployed.policy, deployed.params
    arrays = {**about, "mean": deployed.obs_stats.mean, "std": deployed.obs_stats.std}
    arrays |= {"scale_fn": policy.scale_fn, "scale_bound": policy.scale_bound, "num_layers": policy.num_layers}
    arrays |= {"action_dim": policy.action_dim}
    for j in range(policy.num_layers):
        layer = params[f"layers_{j}"]
        matrices = [(layer["kernel"], layer["bias"])]
        names = [*(f"hidden_{i}" for i in range(policy.hidden_layers - 1)), "out"]
        matrices += [(layer[name]["kernel"], layer[name]["bias"]) for name in names]
        for i, (kernel, bias) in enumerate(matrices):
            arrays |= {f"layer{j}/kernel{i}": kernel, f"layer{j}/bias{i}": bias}
    temporary = path + ".tmp"
    with open(temporary, "wb") as file:
        np.savez(file, **{name: np.asarray(x) for name, x in arrays.items()})
    with np.load(temporary) as weights:
        found = numpy_policy(weights, obs)
    return keep_if_same(temporary, path, found, deployed, obs)


def keep_if_same(temporary: str, path: str, found: np.ndarray, deployed: DeployedPolicy, obs: np.ndarray) -> float:
    """Give an exported file its name if it acts, with the actions `found`, as the policy does."""
    with jax.default_matmul_precision("highest"):  # a GPU's default rounds float32 to ten bits
        unclipped = np.asarray(deployed.unclipped(jnp.asarray(obs)))
    # Of an action above 1 a share: float32 has seven digits, and each dimension of a flow acts on the others.
    sizes = np.abs(unclipped).max(-1, keepdims=True).clip(1)
    difference = (np.abs(found - unclipped.clip(-1, 1)) / sizes).max()
    if not difference <= 1e-5:
        os.remove(temporary)
        raise WrongExport(f"{path} differs from the JAX policy by {difference:.1e}, allowed is 1e-5")
    os.replace(temporary, path)
    print(f"Wrote {path}; on {len(obs)} observations it differs from the JAX policy by {difference:.1e} at most.")
    return float(difference)


def numpy_policy(weights: Mapping[str, np.ndarray], obs: np.ndarray) -> np.ndarray:
    """The deterministic policy of an --export-npz file in nothing but NumPy, to be copied onto a robot.

    Args:
        weights: `dict(np.load(file))`; without `dict`, each call would read the file again.
        obs: raw observations (B, obs_dim).

    Returns:
        actions (B, action_dim), clipped to [-1, 1].
    """
    bounds = {
        "tanh": lambda s: weights["scale_bound"] * np.tanh(s),
        "clip": lambda s: s.clip(-weights["scale_bound"], weights["scale_bound"]),
        "none": lambda s: s,
        "zero": np.zeros_like,
        "asymmetric": lambda s: 2 / np.pi * np.where(s >= 0, 0.1, 2.0) * np.arctan(s / np.where(s >= 0, 0.1, 2.0)),
    }
    bound = bounds[str(weights["scale_fn"])]
    obs = ((obs - weights["mean"]) / weights["std"]).clip(-10, 10)
    action = np.zeros((len(obs), int(weights["action_dim"])))
    for j in reversed(range(int(weights["num_layers"]))):  # f^-1 of z = 0, last layer first
        hidden = np.concatenate((obs, action[:, j % 2 :: 2]), axis=1)
        depth = sum(name.startswith(f"layer{j}/kernel") for name in weights)
        for i in range(depth):
            hidden = hidden @ weights[f"layer{j}/kernel{i}"] + weights[f"layer{j}/bias{i}"]
            if i < depth - 1:
                hidden = np.where(hidden > 0, hidden, np.expm1(np.minimum(hidden, 0)))  # ELU
        scale, shift = np.split(hidden, 2, axis=1)
        action[:, 1 - j % 2 :: 2] = (action[:, 1 - j % 2 :: 2] - shift) * np.exp(-bound(scale))
    return action.clip(-1, 1).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """Return, steps/s, KL and time left: a bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, total: int, start: int, enabled: bool):
        self.total, self.start, self.enabled = total, start, enabled
        self.start_time = self.last_time = time.time()
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", unit_scale=True, dynamic_ncols=True)

    def update(self, step: int, episodic_return: float, kl: float) -> int:
        """Show the state after `step` steps; returns steps/s since the start of this process."""
        now = time.time()
        sps = (step - self.start) / (now - self.start_time)
        if not self.enabled:
            return int(sps)
        if self.bar is not None:
            self.bar.set_postfix_str(f"return {episodic_return:.1f}, KL {kl:.3f}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last_time >= 10 or step >= self.total:
            self.last_time = now
            left = datetime.timedelta(seconds=int((self.total - step) / sps))
            print(
                f"step {step}/{self.total}  return {episodic_return:.1f}  {sps:.0f} steps/s  KL {kl:.4f}  ETA {left}",
                flush=True,
            )
        return int(sps)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class StopSignal:
    """Remembers SIGTERM or Ctrl-C, so that the iteration is finished and saved; a second one ends at once."""

    def __init__(self):
        self.number, self.previous = 0, {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number, _frame) -> None:
        self.number = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class NonFinite(ArithmeticError):
    """Training left the finite numbers; `main` prints it as one line and exits with status 3."""


def train(args: Args, policy_class: type = FlowPolicy) -> dict:
    """Train as `args` say and return final metrics, `run_dir` among them.

    `policy_class(obs_dim, action_dim)` is any flax module with `sample`, `log_prob` and `mode` as in `FlowPolicy`.

    Raises:
        BadInput: with nothing left behind.
        NonFinite: where losses or parameters stop being numbers; the last good checkpoint is kept.
    """
    check_args(args, policy_class)
    if args.distributed:  # before anything else of JAX
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    is_main = jax.process_index() == 0
    checkpoint = None
    # A run killed before it had written its first checkpoint has none to load, and maybe a folder for it.
    if args.resume is not None and saved_iterations(args.resume):
        checkpoint = load_checkpoint(args.resume, policy_class, "--resume")
        if args.total_timesteps < checkpoint["global_step"]:
            raise BadInput(
                f"--total-timesteps is {args.total_timesteps}, but {args.resume} has done {checkpoint['global_step']}, "
                "allowed is at least that"
            )
    check_devices(args)
    args = dataclasses.replace(args, impl=choose_impl(args.impl, args.resume))
    envs = make_envs(args)
    stop = StopSignal()
    run_dir = None
    try:
        run_dir = open_run(args, policy_class, checkpoint)
        if is_main and args.track:
            open_wandb(args, run_dir)
        metrics = train_loop(args, policy_class, envs, run_dir, checkpoint, stop)
    except BadInput:
        if is_main and run_dir and not args.resume:  # Weights & Biases refuses only once there is a folder
            shutil.rmtree(run_dir)
        raise
    finally:
        stop.restore()
    if args.capture_video and is_main and not metrics["stop_signal"]:
        evaluate(run_dir, policy_class, 1, args.temperature, args.seed, capture_video=True)
    return metrics


def open_run(args: Args, policy_class: type, checkpoint: Optional[dict]) -> Path:
    """The run's folder, made anew or resumed, the same for all processes."""
    if args.resume is not None:
        run_dir = Path(args.resume)
        if jax.process_index() == 0:
            _, saved = read_args(args.resume)
            write_args(run_dir, policy_class, {**saved, "total_timesteps": args.total_timesteps})
            cut_event_files(run_dir, checkpoint["event_files"] if checkpoint else {})
        return run_dir
    run_dir, error = None, None
    if jax.process_index() == 0:
        try:
            run_dir = new_run_dir(args, policy_class)
        except BadInput as found:
            error = found
    unix_time = int(run_dir.name.rsplit("__", 1)[1]) if run_dir else 0
    if jax.process_count() > 1:
        unix_time = int(multihost_utils.broadcast_one_to_all(np.int32(unix_time)))
    if not unix_time:
        raise error or BadInput("the first process could not make the run's folder")
    return Path(args.runs_dir, run_name(args, unix_time))


def run_name(args: Args, unix_time: int) -> str:
    return f"{args.env_id}__{args.exp_name}__{args.seed}__{unix_time}".replace("/", "-").replace(":", "-")


def new_run_dir(args: Args, policy_class: type) -> Path:
    """Make the run's folder with its arguments in it, both at once: a run killed at any moment can be resumed."""
    temporary = Path(args.runs_dir, f".new-{os.getpid()}-{time.time_ns()}")
    try:
        temporary.mkdir(parents=True)
        write_args(temporary, policy_class, dataclasses.asdict(args))
    except OSError as error:
        raise BadInput(f"--runs-dir is {args.runs_dir}, allowed is a folder to write to: {error}") from error
    for now in itertools.count(int(time.time())):  # a second run in the same second takes the next one
        try:
            return temporary.rename(Path(args.runs_dir, run_name(args, now)))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                shutil.rmtree(temporary)
                raise BadInput(f"--exp-name is {args.exp_name}, allowed is a part of a file name: {error}") from error


def write_args(run_dir: Path, policy_class: type, args: dict) -> None:
    """Write args.json, atomically: a run that lost it could not be resumed."""
    temporary = run_dir / "args.tmp"
    temporary.write_text(json.dumps({"policy_class": policy_class.__name__, **args}, indent=2) + "\n")
    temporary.replace(run_dir / "args.json")


def make_learner(args: Args, policy_class: type, envs) -> Learner:
    """Networks and optimizer for environments from `make_envs`."""
    obs = jax.eval_shape(envs.reset, jax.random.split(jax.random.PRNGKey(0), args.num_envs)).obs
    policy = make_policy(policy_class, as_dict(obs)["state"].shape[-1], envs.action_size, args)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5))
    return Learner(args, envs, policy, Critic(args.critic_hidden_dims), optimizer)


def make_mesh(args: Args) -> jax.sharding.Mesh:
    """The devices of this run, `num_devices` of every process, along one axis."""
    every = [[x for x in jax.devices() if x.process_index == p] for p in range(jax.process_count())]
    return jax.sharding.Mesh(np.array([x for mine in every for x in mine[: args.num_devices]]), ("envs",))


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Where each array of a state lives: environments are spread over the devices, everything else is on each of them.
    What an iteration then has to exchange, gradients above all, the compiler finds out."""
    everywhere, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("envs"))
    num_envs = len(state.discounted_return)
    shardings = jax.tree.map(lambda _: everywhere, state)
    by_env = jax.tree.map(lambda x: spread if x.ndim and len(x) == num_envs else everywhere, state.env_state)
    return shardings.replace(env_state=by_env, discounted_return=spread)


def describe_state(learner: Learner, mesh: jax.sharding.Mesh) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of a state, without computing one."""
    template = jax.eval_shape(functools.partial(init_state, learner, learner.args.seed))
    return template, state_shardings(template, mesh)


def compile_iteration(learner: Learner, mesh: jax.sharding.Mesh) -> Callable:
    """`train_iteration`, compiled for the devices of `mesh`. Its argument's memory is used again for its result."""
    template, shardings = describe_state(learner, mesh)
    iterate = jax.jit(
        functools.partial(train_iteration, learner),
        in_shardings=(shardings,),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return iterate.lower(template).compile()


class RecentReturn:
    """Mean return of about the last hundred episodes, from the means and counts of iterations."""

    def __init__(self, counts_and_means: list):
        self.recent = [tuple(x) for x in counts_and_means]

    def add(self, count: float, mean: float) -> None:
        if count:
            self.recent.append((count, mean))
        while sum(count for count, _ in self.recent[1:]) >= 100:
            del self.recent[0]

    def mean(self) -> float:
        total = sum(count for count, _ in self.recent)
        return sum(count * mean for count, mean in self.recent) / total if total else float("nan")


def train_loop(args: Args, policy_class, envs, run_dir: Path, checkpoint: Optional[dict], stop: StopSignal) -> dict:
    """Algorithm 1's outer loop, with everything around it. Called by `train`."""
    is_main = jax.process_index() == 0
    learner, mesh = make_learner(args, policy_class, envs), make_mesh(args)
    start_time = time.time()
    if is_main:
        print(f"Compiling for {mesh.size} x {jax.devices()[0].device_kind}, physics {args.impl}.", flush=True)
        if mesh.size > 1 and args.impl == "warp":
            print("With Warp each device simulates all environments; --impl jax spreads them.", flush=True)
    template, shardings = describe_state(learner, mesh)
    iterate = compile_iteration(learner, mesh)
    if checkpoint:
        state = restore(run_dir, "state", template, shardings)
    else:
        state = jax.jit(functools.partial(init_state, learner, args.seed), out_shardings=shardings)()
    if is_main:
        print(f"Compiled in {time.time() - start_time:.0f} s.", flush=True)

    iteration, global_step = (checkpoint["iteration"], checkpoint["global_step"]) if checkpoint else (0, 0)
    writer = open_writer(args, run_dir, iteration) if is_main else None
    recent = RecentReturn(checkpoint["recent_returns"] if checkpoint else [])
    progress = Progress(args.num_iterations * args.batch_size, global_step, enabled=is_main)
    saved_iteration, metrics, sps, stop_signal = iteration, {}, 0, 0
    manager = checkpoint_manager(run_dir, args.keep_interval)
    try:
        while iteration < args.num_iterations and not stop_signal:
            if args.anneal_lr:
                learning_rate = (1 - iteration / args.num_iterations) * args.learning_rate
                learning_rate = jax.device_put(np.float32(learning_rate), shardings.learning_rate)
                state = state.replace(learning_rate=learning_rate)
            iteration += 1
            state, metrics = iterate(state)
            metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
            global_step += args.batch_size
            if not metrics["charts/episodes"]:
                metrics = {k: x for k, x in metrics.items() if not k.startswith(("charts/episodic", "episode/"))}
            broken = [name for name, x in metrics.items() if not math.isfinite(x)]
            if broken or not metrics.pop("is_finite"):
                raise NonFinite(f"{broken[0] if broken else 'a parameter'} is not finite")
            recent.add(metrics["charts/episodes"], metrics.get("charts/episodic_return", 0.0))
            sps = progress.update(global_step, recent.mean(), metrics["losses/approx_kl"])
            metrics["charts/SPS"] = sps
            if is_main:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, global_step)

            stop_signal = stop.number
            if jax.process_count() > 1:
                stop_signal = int(multihost_utils.process_allgather(np.int32(stop_signal)).max())
            is_due = (iteration - 1) % args.checkpoint_interval == 0 or iteration == args.num_iterations
            is_kept = args.keep_interval is not None and iteration % args.keep_interval == 0
            if is_due or is_kept or stop_signal:
                if is_main:
                    writer.close()
                meta = {
                    "policy_class": policy_class.__name__,
                    "args": dataclasses.asdict(args),
                    "iteration": iteration,
                    "global_step": global_step,
                    "recent_returns": recent.recent,
                    "event_files": event_files(run_dir),
                }
                save_checkpoint(manager, iteration, state, meta)
                saved_iteration = iteration
                if is_main:
                    writer = open_writer(args, run_dir, iteration)
    except NonFinite as error:
        culprit = (
            "--scale-fn none usually causes this: nothing bounds exp(s); the default, tanh, does"
            if args.scale_fn == "none"
            else "usually --learning-rate is too high or --scale-bound too wide"
        )
        kept = (
            f"the checkpoint of iteration {saved_iteration} is kept in {run_dir}" if saved_iteration else "none saved"
        )
        raise NonFinite(f"stopped in iteration {iteration}: {error}. {culprit}; {kept}") from error
    finally:
        progress.close()
        manager.close()
        if is_main:
            writer.close()
            if args.track:
                import wandb

                wandb.finish()

    if is_main:
        print_summary(run_dir, global_step, sps, time.time() - start_time, recent, stop_signal)
    return {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "episodic_return": recent.mean(),
        "stop_signal": stop_signal,
        **metrics,
    }


def open_wandb(args: Args, run_dir: Path) -> None:
    """Mirror TensorBoard's events to Weights & Biases."""
    try:
        import wandb
    except ImportError as error:
        raise BadInput(f"--track needs `pip install wandb`: {error}") from error
    try:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            id=run_dir.name,
            name=run_dir.name,
            resume="allow",
            sync_tensorboard=True,
            config=dataclasses.asdict(args),
            allow_val_change=True,  # a continued run may be longer
            dir=str(run_dir),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"--track cannot log in: {reason}; WANDB_MODE=offline needs no account") from error


def open_writer(args: Args, run_dir: Path, iteration: int) -> SummaryWriter:
    """TensorBoard's writer for what comes after a checkpoint. Only a closed file is sure to hold all that was logged:
    that is why each checkpoint ends one."""
    writer = SummaryWriter(str(run_dir), filename_suffix=f".{iteration}")
    if iteration == 0:
        rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    return writer


def print_summary(run_dir: Path, global_step: int, sps: int, seconds: float, recent: RecentReturn, stop_signal) -> None:
    command = f"python {sys.argv[0]}"
    if recent.recent:
        print(f"Last {sum(count for count, _ in recent.recent):.0f} episodes: return {recent.mean():.1f}")
    print(f"{global_step} steps; this session took {seconds:.0f} s, {sps} steps/s once compiled. All is in {run_dir}")
    if stop_signal:
        print(f"Stopped by {signal.Signals(stop_signal).name} and saved. Continue: {command} --resume {run_dir}")
        return
    print(f"  evaluate  {command} --evaluate {run_dir}")
    print(f"  film      {command} --evaluate {run_dir} --capture-video")
    print(f"  export    {command} --evaluate {run_dir} --export-onnx policy.onnx --export-npz policy.npz")
    print(f"  curves    tensorboard --logdir {run_dir.parent}")


def from_json(saved: dict) -> Args:
    """`Args` from what JSON made of them. Raises `TypeError` where names differ."""
    args = Args(**saved)
    return dataclasses.replace(args, critic_hidden_dims=tuple(args.critic_hidden_dims))


def read_args(run_dir: str) -> tuple[str, dict]:
    """Policy class and arguments of a run. Raises `BadInput` where its args.json cannot be read."""
    try:
        saved = json.loads(Path(run_dir, "args.json").read_text())
        return saved.pop("policy_class"), saved
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--resume is {run_dir}, which holds no run (no readable args.json)") from error


def parse_args(
    argv: Optional[list[str]] = None, defaults: Optional[Args] = None, policy_class: type = FlowPolicy
) -> Args:
    """The command line. With --resume or --evaluate, the defaults are the run's own arguments.

    Raises:
        BadInput: for a run that cannot be read, a checkpoint to evaluate of another policy, a flag that contradicts it.
    """
    description = __doc__.split("\n")[0]
    args = tyro.cli(Args, args=argv, default=defaults or Args(), description=description)
    resumes, evaluates = args.resume is not None, args.evaluate is not None  # an empty name is one, and a bad one
    if not (resumes or evaluates):
        return args
    if resumes and evaluates:
        raise BadInput("--resume and --evaluate are given, allowed is one of them")
    flag, path = ("--resume", args.resume) if resumes else ("--evaluate", args.evaluate)
    if resumes:
        found, saved = read_args(path)
        if found != policy_class.__name__:
            raise BadInput(f"--resume is {path}, a run of {found}; this script trains {policy_class.__name__}")
    else:  # whether training was filmed, on which physics, and whether on randomized models, says nothing
        trained = load_checkpoint(path, policy_class)["args"]
        saved = {**trained, "capture_video": False, "impl": None, "domain_randomization": False}
    try:
        saved = from_json(saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # tyro only warns of a default of another type
            args = tyro.cli(Args, args=argv, default=saved, description=description)
    except (TypeError, UserWarning) as error:
        reason = str(error).split(". ")[0]
        raise BadInput(f"{flag} is {path}, a run with other arguments than this script's: {reason}") from error
    if resumes and saved.anneal_lr and args.total_timesteps != saved.total_timesteps:
        raise BadInput(
            f"--total-timesteps is {args.total_timesteps}, but the learning rate of {path} is annealed over "
            f"{saved.total_timesteps}; leave the flag out"
        )
    free = RESUME_FLAGS if resumes else EVALUATE_FLAGS
    for name, value in dataclasses.asdict(args).items():
        if name not in free and value != getattr(saved, name):
            raise BadInput(
                f"{as_flag(name)} is {value}, but {path} was run with {getattr(saved, name)}; leave the flag out"
            )
    return args


def main(policy_class: type = FlowPolicy, defaults: Optional[Args] = None) -> None:
    """The command line: train, resume or evaluate."""
    try:
        args = parse_args(defaults=defaults, policy_class=policy_class)
        if args.evaluate is not None:
            check_args(args, policy_class)
            flags = {name: getattr(args, name) for name in (*PLAY_FLAGS, "capture_video", "export_onnx", "export_npz")}
            evaluate(args.evaluate, policy_class, **flags)
        else:
            stop_signal = train(args, policy_class)["stop_signal"]
            if stop_signal:
                sys.exit(128 + stop_signal)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(3)
    except WrongExport as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
