"""NFPO on Gymnasium: PPO whose policy is a normalizing flow instead of a Gaussian.

Paper: "NFPO: Stabilized Policy Optimization of Normalizing Flow for Robotic Policy Learning" (Shi et al., 2026).

The idea in five lines:
  1. A policy is a density over actions. A RealNVP flow f, conditioned on the observation, maps an action a to a
     latent z = f(a; o) that is N(0, I); the change of variables gives log pi(a|o) = log N(z; 0, I) + log|det df/da|.
  2. To act, draw z and run f backwards. Such a policy can have several modes, and its log-probability is exact.
  3. PPO needs nothing else from a policy, so rollout, GAE, clipped surrogate and critic stay as they are.
  4. Left alone, training inflates the determinant until numbers break. NFPO bounds each scale: l * tanh(s) (Eq. 6).
  5. To deploy, run f backwards from z = 0, the mode of the base distribution (Sec. A.6).

Run:     python nfpo_continuous_action.py --env-id Humanoid-v4
Expect:  1M steps in 10 to 20 minutes on one CPU core, and a mean return of about 950 (three seeds, see the README).

Sections: Args, environment, flow policy and critic, one function for each step of Algorithm 1, checkpoint, evaluation
and export, training. In a hurry, read "Flow policy and critic" and "Algorithm 1": that is the paper. The rest is what a
training run needs in order not to lose, repeat or hide anything.
"""

import dataclasses
import datetime
import difflib
import errno
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Args
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    # What to run
    env_id: str = "Humanoid-v4"
    """id of a Gymnasium environment with Box actions, also as `module:EnvId`"""
    exp_name: str = "nfpo_continuous_action"
    """name of this experiment, a part of the run's name"""
    seed: int = 1
    """seed of networks, noise, minibatches and environments"""
    total_timesteps: int = 1_000_000
    """environment steps to train for, over all environments and processes"""
    runs_dir: str = "runs"
    """folder that receives one folder a run"""

    # Where to run it
    cuda: bool = False
    """put networks and batches on a GPU; small networks are faster on the CPU"""
    compile: bool = True
    """compile policy and update with AOTInductor; without a C++ compiler they run eagerly"""
    torch_threads: int = 1
    """PyTorch threads; more than one slows small networks down, and much more so when runs share a machine"""
    torch_deterministic: bool = True
    """choose deterministic GPU kernels"""

    # What to record
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project_name: str = "nfpo"
    """Weights & Biases project"""
    wandb_entity: Optional[str] = None
    """Weights & Biases entity (team)"""
    capture_video: bool = False
    """film episodes into the run's `videos` folder"""
    checkpoint_interval: int = 10
    """iterations between two checkpoints; the first and the last iteration always write one"""
    keep_interval: Optional[int] = None
    """iterations between checkpoints that are kept beside the newest, as checkpoint-STEP.pt; none: no other is kept"""

    # Continue, evaluate, export
    resume: Optional[str] = None
    """run folder to continue, with the run's own arguments"""
    evaluate: Optional[str] = None
    """run folder or checkpoint to play instead of training"""
    eval_episodes: int = 10
    """episodes that --evaluate plays"""
    temperature: float = 0.0
    """factor on the standard deviation of the base noise in --evaluate; 0 is the deterministic deployment mode"""
    export_onnx: Optional[str] = None
    """file that --evaluate writes the deterministic policy to, observation statistics inside"""

    # Algorithm 1: PPO, as in CleanRL
    learning_rate: float = 3e-4
    """learning rate of Adam"""
    num_envs: int = 1
    """parallel environments in each process"""
    async_envs: bool = False
    """step every environment in a worker process of its own"""
    num_steps: int = 2048
    """steps of each environment in one rollout (T in Algorithm 1)"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 32
    """minibatches an epoch (M in Algorithm 1)"""
    update_epochs: int = 10
    """epochs over each rollout (N in Algorithm 1)"""
    norm_adv: bool = True
    """normalize advantages within a minibatch"""
    clip_coef: float = 0.2
    """clip range of the probability ratio (epsilon in Algorithm 1)"""
    clip_vloss: bool = True
    """clip the value loss as well"""
    ent_coef: float = 0.0
    """entropy coefficient; the entropy is estimated from samples"""
    vf_coef: float = 0.5
    """value-loss coefficient"""
    max_grad_norm: float = 0.5
    """norm to which gradients are clipped, all networks together"""
    target_kl: Optional[float] = None
    """approximate KL divergence above which the remaining epochs of an update are skipped"""

    # Eq. 6: the flow, and the variants of the paper's ablations
    num_flow_layers: int = 4
    """coupling layers K; fewer than 3 cannot let every action dimension act on every other"""
    hidden_dim: int = 64
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
        """Transitions in one process's rollout, T * N."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    def num_iterations(self, world_size: int = 1) -> int:
        """Iterations of Algorithm 1's outer loop; a last incomplete batch is not trained on."""
        return self.total_timesteps // (self.batch_size * world_size)


FLOW_FLAGS = ("num_flow_layers", "hidden_dim", "hidden_layers", "scale_fn", "scale_bound", "learned_base_std")
# Flags that may differ between a run and its continuation, or its evaluation: they do not change what is computed.
RESUME_FLAGS = ("resume", "track", "wandb_project_name", "wandb_entity", "capture_video", "runs_dir", "keep_interval")
EVALUATE_FLAGS = (*RESUME_FLAGS, "evaluate", "eval_episodes", "temperature", "export_onnx", "seed", "cuda", "compile")


class BadInput(ValueError):
    """An input that the user has to change; `main` prints it as one line and exits with status 2."""


def check_args(args: Args, policy_class: type, world_size: int = 1) -> None:
    """Raise `BadInput` naming flag, value and what is allowed. Runs before anything is written."""
    at_least_1 = "num_envs num_steps num_minibatches update_epochs num_flow_layers hidden_dim hidden_layers"
    for names, allowed, is_allowed in (
        (at_least_1 + " torch_threads checkpoint_interval eval_episodes", "at least 1", lambda x: x >= 1),
        ("learning_rate scale_bound max_grad_norm", "a number above 0", lambda x: 0 < x < float("inf")),
        ("gamma gae_lambda", "between 0 and 1", lambda x: 0 <= x <= 1),
        ("clip_coef", "above 0 and below 1", lambda x: 0 < x < 1),
        ("ent_coef vf_coef action_noise temperature", "a number of at least 0", lambda x: 0 <= x < float("inf")),
        ("target_kl", "above 0", lambda x: x is None or x > 0),
        ("keep_interval", "at least 1", lambda x: x is None or x >= 1),
        ("seed", "between 0 and 2**31 - 1", lambda x: 0 <= x < 2**31),
    ):
        for name in names.split():
            if not is_allowed(getattr(args, name)):
                raise BadInput(f"{as_flag(name)} is {getattr(args, name)}, allowed is {allowed}")
    if args.batch_size % args.num_minibatches:
        raise BadInput(
            f"--num-minibatches is {args.num_minibatches}, allowed is a divisor of "
            f"num_steps * num_envs = {args.batch_size}"
        )
    if args.norm_adv and args.minibatch_size < 2:
        raise BadInput(
            f"--num-minibatches is {args.num_minibatches}, allowed is at most {args.batch_size // 2}: "
            "advantages are normalized over a minibatch, and one sample has no deviation"
        )
    if args.num_iterations(world_size) < 1:
        raise BadInput(
            f"--total-timesteps is {args.total_timesteps}, allowed is at least one batch: num_steps * num_envs * "
            f"processes = {args.batch_size * world_size}"
        )
    if args.export_onnx is not None:
        if args.evaluate is None:
            raise BadInput("--export-onnx needs --evaluate RUN, the run to export")
        path = Path(args.export_onnx).absolute()
        if path.is_dir() or not path.parent.is_dir():
            raise BadInput(f"--export-onnx is {args.export_onnx}, allowed is a file in an existing folder")
        if args.temperature > 0:  # or the returns it prints would not be the file's
            raise BadInput(f"--temperature is {args.temperature}, allowed is 0 with --export-onnx: it holds no noise")
    if not issubclass(policy_class, FlowPolicy):
        for name in FLOW_FLAGS:
            if getattr(args, name) != getattr(Args, name):
                raise BadInput(f"{as_flag(name)} is {getattr(args, name)}, but {policy_class.__name__} has no flow")
    if args.cuda and args.evaluate is None and not torch.cuda.is_available():
        raise BadInput("--cuda is given, but PyTorch finds no GPU here")


def resume_flags(args: Args) -> tuple[str, ...]:
    """Flags that a continued run may change: its length too, unless the learning rate depends on it."""
    return RESUME_FLAGS if args.anneal_lr else (*RESUME_FLAGS, "total_timesteps")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------------------------------------------------------
# Environment
# ----------------------------------------------------------------------------------------------------------------------


class ResumableEnv(gym.Wrapper):
    """Outermost wrapper: flat actions in, no infos out, and for MuJoCo the full state to be saved and restored.

    Infos are dropped because the vector environment would merge every entry at every step, and nothing here reads them.
    """

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self.index = index
        self.action_shape = env.action_space.shape
        self.action_space = gym.spaces.flatten_space(env.action_space)

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        return *self.env.step(action.reshape(self.action_shape))[:4], {}

    def is_restorable(self) -> bool:
        """Whether it is one of Gymnasium's MuJoCo tasks: what others keep beside the simulator's state is unknown."""
        env = self.unwrapped
        wrapped = gym.spec(env.spec.id).additional_wrappers
        return type(env).__module__.startswith("gymnasium.envs.mujoco.") and not wrapped

    def get_state(self) -> Optional[dict]:
        """Everything the next step depends on, or None where that is not known."""
        if not self.is_restorable():
            return None
        import mujoco

        model, data = self.unwrapped.model, self.unwrapped.data
        specification = mujoco.mjtState.mjSTATE_INTEGRATION
        integration = np.empty(mujoco.mj_stateSize(model, specification))
        mujoco.mj_getState(model, data, integration, specification)
        return {
            "integration": torch.from_numpy(integration),
            # Humanoid and Ant compute rewards from positions that the previous step left behind (xpos, xipos), which
            # the integration state lacks and a forward pass would overwrite with newer ones.
            "derived": {name: torch.tensor(array) for name, array in mujoco_arrays(data).items()},
            "counters": {name: self.get_wrapper_attr(name) for name in self.counters()},
            "random": json.dumps(self.unwrapped.np_random.bit_generator.state),
        }

    def set_state(self, states: list[dict]) -> None:
        """Restore this environment's entry of `states`, one for each environment of the process."""
        import mujoco

        state, model, data = states[self.index], self.unwrapped.model, self.unwrapped.data
        mujoco.mj_setState(model, data, state["integration"].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
        for name, array in mujoco_arrays(data).items():
            if name in state["derived"] and state["derived"][name].shape == array.shape:
                array[:] = state["derived"][name].numpy()
        for name, value in state["counters"].items():
            self.set_wrapper_attr(name, value)
        self.unwrapped.np_random.bit_generator.state = json.loads(state["random"])

    def counters(self) -> list[str]:
        """The wrappers' own state: TimeLimit's step count and OrderEnforcing's flag."""
        return [name for name in ("_elapsed_steps", "_has_reset") if self.has_wrapper_attr(name)]


def mujoco_arrays(data) -> dict[str, np.ndarray]:
    """The non-empty float arrays of an `MjData`, as views."""
    arrays = {name: getattr(data, name) for name in dir(data) if not name.startswith("_")}
    return {k: v for k, v in arrays.items() if isinstance(v, np.ndarray) and v.dtype == np.float64 and v.size}


def make_env(env_id: str, index: int = 0, video_dir: Optional[Path] = None, video_prefix: str = "train", **video):
    """Return a function that builds environment `index`; `video` goes to RecordVideo (`episode_trigger`, ...)."""

    def thunk() -> gym.Env:
        render = {"render_mode": "rgb_array"} if video_dir else {}
        env = gym.make(env_id, disable_env_checker=True, **render)
        if video_dir:
            env = gym.wrappers.RecordVideo(env, str(video_dir), name_prefix=video_prefix, **video)
        if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
            env = gym.wrappers.FlattenObservation(env)
        return ResumableEnv(env, index)

    return thunk


def make_envs(args: Args, rank: int = 0, video_dir: Optional[Path] = None, video_prefix: str = "train"):
    """The process's vector environment. Where an episode ends it resets within the same step, so that no step is wasted
    on the reset, and hands out the true last observation as `infos["final_obs"]`."""
    thunks = [
        make_env(args.env_id, i, video_dir if rank == 0 and i == 0 else None, video_prefix)
        for i in range(args.num_envs)
    ]
    vector_class = gym.vector.AsyncVectorEnv if args.async_envs else gym.vector.SyncVectorEnv
    return vector_class(thunks, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def repair_gl() -> None:
    """Where MUJOCO_GL names a library that is missing, MuJoCo cannot even be imported: go on without any GL."""
    if not os.environ.get("MUJOCO_GL"):
        return
    try:
        import mujoco  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] in ("mujoco", "OpenGL")]:
            del sys.modules[name]
        os.environ["MUJOCO_GL"] = "disabled"


def check_env(env_id: str) -> None:
    """Raise `BadInput` for an environment that does not exist or has the wrong kind of spaces."""
    repair_gl()
    try:
        env = gym.make(env_id, disable_env_checker=True)
    except Exception as error:
        # Whatever an environment raises while it is built, its user wants the sentence, not the stack.
        near = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.4)
        hint = f"; nearest ids: {', '.join(near)}" if near and env_id not in gym.registry else ""
        raise BadInput(f"--env-id is {env_id}, which cannot be made: {' '.join(str(error).split())}{hint}") from error
    env.close()
    if not isinstance(env.action_space, gym.spaces.Box):
        raise BadInput(f"--env-id is {env_id} with actions {env.action_space}, allowed are Box actions")
    leaves, spaces = [], [env.observation_space]
    while spaces:
        space = spaces.pop()
        if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
            spaces.extend(space.spaces.values() if isinstance(space, gym.spaces.Dict) else space.spaces)
        else:
            leaves.append(space)
    if not leaves or not all(isinstance(leaf, gym.spaces.Box) for leaf in leaves):
        raise BadInput(
            f"--env-id is {env_id} with observations {env.observation_space}, allowed are Box or Dict/Tuple of Box"
        )
    if all(len(leaf.shape) >= 2 and leaf.dtype == np.uint8 for leaf in leaves):
        raise BadInput(
            f"--env-id is {env_id}, which observes only images, allowed are vector observations: this script has no "
            "image encoder"
        )


def can_render(env_id: str) -> bool:
    """Whether frames of the environment can be drawn here; prints one line that says what to install if not."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "egl"  # off-screen; GLFW, the default, needs a display
    env = None
    try:
        import moviepy  # noqa: F401  # RecordVideo needs it, and would say so only at the end of an episode

        if os.environ.get("MUJOCO_GL") == "egl":
            import mujoco.egl  # noqa: F401  # fails here in one piece; within Gymnasium's viewer it leaves half of one
        elif os.environ.get("MUJOCO_GL") == "disabled":
            raise RuntimeError("what MUJOCO_GL names is missing")
        env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
        env.reset(seed=0)
        env.render()
        return True
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        print(
            f"--capture-video: cannot draw {env_id} here ({reason}); on Debian `apt-get install libegl1` and set "
            "MUJOCO_GL=egl. Going on without video.",
            file=sys.stderr,
        )
        return False
    finally:
        if env is not None:
            env.close()


class RunningMeanStd:
    """Mean and variance of a stream, in float64 (Welford's algorithm over batches). Starts as one weak unit sample."""

    def __init__(self, shape: tuple = ()):
        self.count = 1e-4
        self.mean = np.zeros(shape)
        self.sum_squares = np.full(shape, 1e-4)  # of the deviations from the mean

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.sum_squares / self.count + 1e-8)

    def update(self, batch: np.ndarray) -> None:
        """Take in a batch of shape (B, *shape)."""
        self.count += len(batch)
        deviation = batch - self.mean
        self.mean = self.mean + deviation.sum(0) / self.count
        self.sum_squares = self.sum_squares + (deviation * (batch - self.mean)).sum(0)

    def state_dict(self) -> dict:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"].item()
        self.mean, self.sum_squares = state["mean"].numpy().copy(), state["sum_squares"].numpy().copy()

    def merge_processes(self, before: dict) -> None:
        """Merge what each process has seen since all of them held `before`; afterwards all hold the same again."""
        shift, old_count = before["mean"].numpy(), before["count"].item()
        distance = self.mean - shift
        # Sums about a common shift simply add up; each process contains `before` once, so all but one are taken off.
        sums = [np.array([self.count]), self.count * distance, self.sum_squares + self.count * distance**2]
        total = torch.from_numpy(np.concatenate([x.ravel() for x in sums]))
        dist.all_reduce(total)
        copies = dist.get_world_size() - 1
        count, first, second = np.split(total.numpy(), [1, 1 + shift.size])
        self.count = count.item() - copies * old_count
        distance = first.reshape(shift.shape) / self.count
        self.mean = shift + distance
        second = second.reshape(shift.shape) - copies * before["sum_squares"].numpy()
        self.sum_squares = second - self.count * distance**2


def normalize_obs(stats: RunningMeanStd, obs: np.ndarray) -> np.ndarray:
    """Observations (..., obs_dim) with zero mean and unit variance, clipped to +-10, float32."""
    return ((obs - stats.mean) / stats.std).clip(-10, 10).astype(np.float32)


class RewardNormalizer:
    """Divides rewards by the standard deviation of the discounted return and clips them to +-10.

    The return starts anew after an episode's last reward, be the end a termination or a time limit.
    """

    def __init__(self, num_envs: int, gamma: float):
        self.gamma = gamma
        self.stats = RunningMeanStd()
        self.returns = np.zeros(num_envs)

    def __call__(self, reward: np.ndarray, done: np.ndarray) -> np.ndarray:
        """Rewards and ends, both (N,), to normalized rewards (N,)."""
        self.returns = self.returns * self.gamma + reward
        self.stats.update(self.returns)
        self.returns[done] = 0.0
        return (reward / self.stats.std).clip(-10, 10)


# ----------------------------------------------------------------------------------------------------------------------
# Flow policy and critic
# ----------------------------------------------------------------------------------------------------------------------


def linear(in_dim: int, out_dim: int, gain: float = 2**0.5, bias: bool = True) -> nn.Linear:
    """A linear layer, orthogonal with zero bias as in CleanRL; also the empty ones of one-dimensional actions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        layer = nn.Linear(in_dim, out_dim, bias=bias)
    if layer.weight.numel():
        nn.init.orthogonal_(layer.weight, gain)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class CouplingLayer(nn.Module):
    """The networks s_j and t_j of one coupling layer f_j (Eq. 6): two halves of one output.

    The observation's part of the first matrix product is done by `FlowPolicy` for all layers at once and comes in as
    `obs_features`; adding it here makes the sum the product with [observation, kept part], as in the paper.
    """

    def __init__(self, kept_dim, transformed_dim, hidden_dim, hidden_layers, scale_fn, scale_bound):
        super().__init__()
        self.scale_fn, self.scale_bound = scale_fn, scale_bound
        self.kept = linear(kept_dim, hidden_dim, bias=False)
        self.hidden = nn.ModuleList(linear(hidden_dim, hidden_dim) for _ in range(hidden_layers - 1))
        # A small output: at first every f_j is nearly the identity, and pi nearly N(0, I).
        self.out = linear(hidden_dim, 2 * transformed_dim, gain=0.01)

    def forward(self, obs_features: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, hidden_dim) and kept part (B, |d|) to bounded log-scale and shift, each (B, D - |d|)."""
        hidden = torch.tanh(obs_features + self.kept(kept))
        for layer in self.hidden:
            hidden = torch.tanh(layer(hidden))
        scale, shift = self.out(hidden).chunk(2, dim=-1)
        return self.bound(scale), shift

    def bound(self, scale: torch.Tensor) -> torch.Tensor:
        """The paper's one trick, and the variants it is compared with (Sec. 4, Fig. 2)."""
        if self.scale_fn == "tanh":
            return self.scale_bound * torch.tanh(scale)
        if self.scale_fn == "clip":
            return scale.clamp(-self.scale_bound, self.scale_bound)
        if self.scale_fn == "none":
            return scale
        if self.scale_fn == "zero":
            return torch.zeros_like(scale)
        # Andrade (2024): growth is bounded much tighter than shrinkage.
        alpha = torch.full_like(scale, 2.0).masked_fill(scale >= 0, 0.1)
        return (2 / torch.pi) * alpha * torch.atan(scale / alpha)


class FlowPolicy(nn.Module):
    """A conditional RealNVP as a policy (Eq. 6, Sec. A.7). Needs nothing from the rest of this file but the above.

    Args:
        obs_dim: size of an observation.
        action_dim: size D of an action, at least 1.
        hidden_dim, hidden_layers: width and depth of each coupling network.
        num_layers: coupling layers K. Even-indexed dimensions are kept in the first, odd-indexed in the second, ...
        scale_bound: the bound l.
        scale_fn: "tanh" (the paper's), "clip", "none", "zero" or "asymmetric".
        learned_base_std: give the base distribution N(0, diag(sigma^2)) a learned sigma instead of 1.

    Compute probabilities in float32: under bfloat16 those of `sample` and `log_prob` differ by up to 0.1, half of what
    PPO clips at.

    Raises:
        ValueError: for an unknown `scale_fn`, a size below 1 or a bound that is not above 0.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dim: int = 64,
        num_layers: int = 4,
        scale_bound: float = 0.5,
        scale_fn: str = "tanh",
        hidden_layers: int = 1,
        learned_base_std: bool = False,
    ):
        super().__init__()
        if scale_fn not in ("tanh", "clip", "none", "zero", "asymmetric"):
            raise ValueError(f"scale_fn is {scale_fn!r}, allowed are tanh, clip, none, zero and asymmetric")
        if min(obs_dim, action_dim, hidden_dim, num_layers, hidden_layers) < 1 or not scale_bound > 0:
            raise ValueError("sizes must be at least 1 and scale_bound above 0")
        self.action_dim, self.num_layers, self.scale_bound = action_dim, num_layers, scale_bound
        even_dim, odd_dim = (action_dim + 1) // 2, action_dim // 2
        self.layers = nn.ModuleList()
        # The observation is the same in every layer, so its part of the K first matrix products is one product.
        self.obs_encoder = linear(obs_dim, num_layers * hidden_dim)
        for obs_weight in self.obs_encoder.weight.data.chunk(num_layers):
            kept_dim, transformed_dim = (even_dim, odd_dim) if len(self.layers) % 2 == 0 else (odd_dim, even_dim)
            layer = CouplingLayer(kept_dim, transformed_dim, hidden_dim, hidden_layers, scale_fn, scale_bound)
            weight = linear(obs_dim + kept_dim, hidden_dim).weight.data
            obs_weight.copy_(weight[:, :obs_dim])
            layer.kept.weight.data.copy_(weight[:, obs_dim:])
            self.layers.append(layer)
        self.base_log_std = nn.Parameter(torch.zeros(action_dim)) if learned_base_std else None
        # Where each dimension lies once the even and the odd half are laid end to end.
        order = torch.arange(action_dim)
        self.register_buffer("interleave", order // 2 + (order % 2) * even_dim, persistent=False)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|o) = log N(f(a; o); 0, I) + sum_j sum l*tanh(s_j) (Eq. 6). (B, obs_dim), (B, D) -> (B,)."""
        z, log_det = self.forward(obs, action)
        return self.base_log_prob(z) + log_det

    def sample(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw actions (Algorithm 1, lines 4-6). (..., obs_dim) -> actions (..., D), log-probabilities (...).

        `temperature` multiplies the standard deviation of the base noise, and 0 gives the deterministic policy
        (Sec. A.6). The log-probability is always that of the policy at temperature 1.
        """
        z = obs.new_zeros(*obs.shape[:-1], self.action_dim)
        if temperature > 0:
            z = temperature * torch.randn_like(z)
            if self.base_log_std is not None:
                z = z * self.base_log_std.exp()
        action, log_det = self.inverse(obs, z)
        return action, self.base_log_prob(z) - log_det

    def base_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log N(z; 0, diag(sigma^2)), with sigma = 1 unless it is learned. (B, D) -> (B,)."""
        log_normalizer = 0.5 * self.action_dim * math.log(2 * math.pi)
        if self.base_log_std is not None:
            z = z * (-self.base_log_std).exp()
            log_normalizer = log_normalizer + self.base_log_std.sum()
        return -0.5 * z.square().sum(-1) - log_normalizer

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f of the paper: actions (B, D) to latents (B, D) and log|det dz/da| (B,)."""
        z, log_scales = self.transform(obs, action)
        return z, sum(log_scale.sum(-1) for log_scale in log_scales)  # each Jacobian is triangular

    def transform(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """f of the paper, with every layer's log-scale: actions (B, D) to latents (B, D) and K of (B, D - |d|)."""
        kept, other = action[..., 0::2], action[..., 1::2]
        log_scales = []
        for layer, obs_features in zip(self.layers, self.obs_encoder(obs).chunk(self.num_layers, dim=-1)):
            log_scale, shift = layer(obs_features, kept)
            other = other * log_scale.exp() + shift  # Eq. 6
            log_scales.append(log_scale)
            kept, other = other, kept
        even, odd = (other, kept) if self.num_layers % 2 else (kept, other)
        return self.merge(even, odd), log_scales

    def inverse(self, obs: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f^-1 of the paper, last layer first: latents (B, D) to actions (B, D) and log|det da/dz| (B,)."""
        kept, other = z[..., 0::2], z[..., 1::2]
        if self.num_layers % 2:
            kept, other = other, kept
        all_features = self.obs_encoder(obs).chunk(self.num_layers, dim=-1)
        log_det = 0.0
        for layer, obs_features in zip(reversed(self.layers), reversed(all_features)):
            kept, other = other, kept
            log_scale, shift = layer(obs_features, kept)
            other = (other - shift) * (-log_scale).exp()
            log_det = log_det - log_scale.sum(-1)
        return self.merge(kept, other), log_det

    def merge(self, even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
        """Undo the split: even- and odd-indexed dimensions to (B, D) in their own order."""
        return torch.cat((even, odd), dim=-1)[..., self.interleave]

    @torch.no_grad()
    def diagnostics(self, obs: torch.Tensor, action: torch.Tensor) -> dict[str, float]:
        """What the paper diagnoses instability with (Fig. 2): log-determinant, size and saturation of the scales."""
        _, log_scales = self.transform(obs, action)
        size = torch.cat(log_scales, dim=-1).abs()
        found = {
            "flow/log_det": sum(log_scale.sum(-1) for log_scale in log_scales).mean().item(),
            "flow/scale_abs_mean": size.mean().item(),
        }
        if self.layers[0].scale_fn in ("tanh", "clip"):  # the others are not bounded by l
            found["flow/scale_saturation"] = (size > 0.95 * self.scale_bound).float().mean().item()
        return found


class Critic(nn.Module):
    """The value function V(o): a tanh network, (B, obs_dim) -> (B,)."""

    def __init__(self, obs_dim: int, hidden_dim: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            linear(obs_dim, hidden_dim),
            nn.Tanh(),
            linear(hidden_dim, hidden_dim),
            nn.Tanh(),
            linear(hidden_dim, 1, 1.0),
        )

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs).squeeze(-1)


def make_policy(policy_class: type, obs_dim: int, action_dim: int, args: Args) -> nn.Module:
    """`policy_class(obs_dim, action_dim)`; flows also get their flags."""
    if not issubclass(policy_class, FlowPolicy):
        return policy_class(obs_dim, action_dim)
    flags = {name: getattr(args, name) for name in FLOW_FLAGS}
    return policy_class(obs_dim, action_dim, num_layers=flags.pop("num_flow_layers"), **flags)


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# ----------------------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """The buffer B of Algorithm 1: T steps of N environments."""

    obs: torch.Tensor  # (T, N, obs_dim), normalized
    actions: torch.Tensor  # (T, N, action_dim), as sampled: the environment received them clipped to its Box
    log_probs: torch.Tensor  # (T, N)
    rewards: torch.Tensor  # (T, N), normalized
    values: torch.Tensor  # (T, N)
    next_values: torch.Tensor  # (T, N), of the state that really followed
    terminated: torch.Tensor  # (T, N)
    done: torch.Tensor  # (T, N), terminated or truncated


class Collector:
    """What a rollout hands to the next one: environments, their current observation and the running statistics."""

    def __init__(self, envs: gym.vector.VectorEnv, gamma: float, device: torch.device):
        self.envs = envs
        self.low, self.high = envs.single_action_space.low, envs.single_action_space.high
        self.obs_stats = RunningMeanStd(envs.single_observation_space.shape)
        self.normalize_reward = RewardNormalizer(envs.num_envs, gamma)
        self.obs = torch.zeros(envs.num_envs, *envs.single_observation_space.shape, device=device)
        self.episode_return = np.zeros(envs.num_envs)
        self.episode_length = np.zeros(envs.num_envs, dtype=np.int64)

    def stats(self) -> tuple[dict, dict]:
        """The statistics of observations and of rewards."""
        return self.obs_stats.state_dict(), self.normalize_reward.stats.state_dict()

    def reset(self, seed: int) -> None:
        """Start new episodes everywhere."""
        self.observe(self.envs.reset(seed=seed)[0])
        for array in (self.episode_return, self.episode_length, self.normalize_reward.returns):
            array[:] = 0

    def observe(self, raw_obs: np.ndarray) -> None:
        self.obs_stats.update(raw_obs)
        self.obs.copy_(torch.from_numpy(normalize_obs(self.obs_stats, raw_obs)))

    def step(self, action: torch.Tensor):
        """Step all environments. Actions (N, action_dim), unclipped, to normalized rewards, terminated and done (N,),
        {environment: normalized final observation} and [(return, length)] of the episodes that ended."""
        action = action.cpu().numpy()
        if not np.isfinite(action).all():
            raise NonFinite("the policy's actions are not finite")
        action = action.clip(self.low, self.high)
        raw_obs, reward, terminated, truncated, infos = self.envs.step(action)
        done = terminated | truncated
        self.episode_return += reward
        self.episode_length += 1
        final_obs, episodes = {}, []
        for i in done.nonzero()[0]:
            # The statistics are used and not updated: the reset's observation takes this step's place in them.
            final_obs[i] = normalize_obs(self.obs_stats, infos["final_obs"][i])
            episodes.append((float(self.episode_return[i]), int(self.episode_length[i])))
            self.episode_return[i], self.episode_length[i] = 0.0, 0
        self.observe(raw_obs)
        return self.normalize_reward(reward, done), terminated, done, final_obs, episodes

    def state_dict(self) -> dict:
        return {
            "obs_stats": self.obs_stats.state_dict(),
            "reward_stats": self.normalize_reward.stats.state_dict(),
            "returns": torch.tensor(self.normalize_reward.returns),
            "obs": self.obs.cpu(),
            "episode_return": torch.tensor(self.episode_return),
            "episode_length": torch.tensor(self.episode_length),
            "envs": list(self.envs.call("get_state")),
        }

    def load_state_dict(self, state: dict) -> bool:
        """Restore everything; False where the environments cannot be restored, so that their episodes start anew."""
        self.obs_stats.load_state_dict(state["obs_stats"])
        self.normalize_reward.stats.load_state_dict(state["reward_stats"])
        if None in state["envs"]:
            return False
        self.envs.call("set_state", state["envs"])
        self.normalize_reward.returns[:] = state["returns"].numpy()
        self.obs.copy_(state["obs"])
        self.episode_return[:] = state["episode_return"].numpy()
        self.episode_length[:] = state["episode_length"].numpy()
        return True


@torch.no_grad()
def collect_rollout(collector: Collector, sample, critic: nn.Module, num_steps: int) -> tuple[Rollout, list]:
    """Algorithm 1, lines 2-9. `sample` is the policy's. Returns the buffer and (step, return, length) of each episode
    that ended in it, `step` counting 1 .. T."""
    num_envs, device = len(collector.obs), collector.obs.device
    obs = torch.empty(num_steps + 1, *collector.obs.shape, device=device)
    actions = torch.empty(num_steps, num_envs, collector.low.size, device=device)
    log_probs = torch.empty(num_steps, num_envs, device=device)
    rewards = np.empty((num_steps, num_envs), dtype=np.float32)
    terminated = np.empty((num_steps, num_envs), dtype=np.float32)
    done = np.empty((num_steps, num_envs), dtype=np.float32)
    ends, finals, episodes = [], [], []
    for t in range(num_steps):
        obs[t] = collector.obs
        actions[t], log_probs[t] = sample(obs[t])  # lines 4-6
        rewards[t], terminated[t], done[t], final_obs, ended = collector.step(actions[t])  # line 7
        ends.extend((t, i) for i in final_obs)
        finals.extend(final_obs.values())
        episodes.extend((t + 1, *episode) for episode in ended)
    obs[num_steps] = collector.obs

    # The critic does not change during a rollout: one batch is faster than T small ones.
    values = critic(obs.flatten(0, 1)).view(num_steps + 1, num_envs)
    next_values = values[1:].clone()
    if finals:  # where an episode ended, the next observation is another episode's
        steps, indexes = map(list, zip(*ends))
        next_values[steps, indexes] = critic(torch.from_numpy(np.stack(finals)).to(device))
    tensors = [torch.from_numpy(x).to(device) for x in (rewards, terminated, done)]
    return Rollout(obs[:-1], actions, log_probs, tensors[0], values[:-1], next_values, *tensors[1:]), episodes


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    done: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> torch.Tensor:
    """Generalized advantage estimation (Algorithm 1, line 10; Schulman et al. 2016, Eq. 16). All (T, N).

    Args:
        next_values: value of the state that really followed, the final observation's where an episode ended.
        terminated: 0/1 or bool, the state had no future: no bootstrap. A time limit is not a termination.
        done: 0/1 or bool, terminated or truncated: the next row is another episode, so the trace is cut.
    """
    # Filled and not multiplied by 0: where a simulation broke and the episode was ended for it, the value may be NaN.
    deltas = rewards + gamma * next_values.masked_fill(terminated.bool(), 0.0) - values
    decays = gamma * gae_lambda * (1 - done.to(values))
    advantages, last = [], torch.zeros_like(values[0])
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind())):
        last = torch.addcmul(delta, decay, last)
        advantages.append(last)
    return torch.stack(advantages[::-1])


def minibatch_loss(policy, critic, args: Args, obs, actions, old_log_probs, advantages, returns, old_values):
    """The function `update` of Algorithm 1, lines 19-23, on a minibatch of B. Returns the scalar loss and a tensor of
    policy loss, value loss, old approximate KL, approximate KL, share of clipped ratios."""
    log_ratio = policy.log_prob(obs, actions) - old_log_probs
    ratio = log_ratio.exp()  # r(theta), line 22
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()  # Eq. 2, line 23

    values = critic(obs)
    errors = (values - returns).square()
    if args.clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        errors = torch.max(errors, (clipped_values - returns).square())
    value_loss = 0.5 * errors.mean()

    loss = policy_loss + args.vf_coef * value_loss
    if args.ent_coef > 0:
        # No closed form: -E[log pi(a)] over samples of the current policy, differentiated through the samples.
        loss = loss + args.ent_coef * policy.sample(obs)[1].mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()  # Schulman's low-variance estimator, joschu.net/blog/kl-approx.html
        clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
        stats = torch.stack((policy_loss, value_loss, -log_ratio.mean(), approx_kl, clip_fraction))
    return loss, stats


def minibatch_gradient(policy, critic, args: Args, *minibatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `minibatch_loss` as one vector, in `parameters_of`'s order, and the loss's tensor of statistics.

    The gradient is taken in here, not by `loss.backward()` outside, so that one compiled graph holds both passes.
    """
    loss, stats = minibatch_loss(policy, critic, args, *minibatch)
    gradients = torch.autograd.grad(loss, parameters_of(policy, critic), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients]), stats


def parameters_of(policy: nn.Module, critic: nn.Module) -> list[nn.Parameter]:
    return [p for p in (*policy.parameters(), *critic.parameters()) if p.requires_grad]


def flatten_parameters(parameters: list[nn.Parameter]) -> nn.Parameter:
    """One vector that holds all parameters; they become views of it. Then a single operation clips the gradients, one
    averages them over processes and one steps Adam, where there would be twenty each."""
    vector = nn.Parameter(parameters_to_vector(parameters).detach())
    vector_to_parameters(vector.data, parameters)
    return vector


def ppo_update(
    policy, critic, optimizer, rollout: Rollout, args: Args, gradient_fn=minibatch_gradient
) -> dict[str, float]:
    """Algorithm 1, lines 10-17: N epochs of M minibatches.

    Args:
        optimizer: over the vector that `flatten_parameters` makes of the policy's and the critic's parameters.
        gradient_fn: `minibatch_gradient`, or its compiled form.
    """
    advantages = compute_gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.done,
        args.gamma,
        args.gae_lambda,
    )
    returns = advantages + rollout.values
    obs, actions, old_log_probs = rollout.obs, rollout.actions, rollout.log_probs
    if args.action_noise > 0:  # Sec. 5.1; the ratio compares both policies at the same, noisy action
        actions = actions + args.action_noise * torch.randn_like(actions)
        with torch.no_grad():
            old_log_probs = policy.log_prob(obs.flatten(0, 1), actions.flatten(0, 1)).view_as(old_log_probs)
    batch = [x.flatten(0, 1) for x in (obs, actions, old_log_probs, advantages, returns, rollout.values)]
    (parameters,) = optimizer.param_groups[0]["params"]

    all_stats, grad_norms = [], []
    for _ in range(args.update_epochs):
        permutation = torch.randperm(args.batch_size, device=obs.device)
        shuffled = [x[permutation] for x in batch]
        for start in range(0, args.batch_size, args.minibatch_size):
            minibatch = [x[start : start + args.minibatch_size] for x in shuffled]
            gradient, stats = gradient_fn(policy, critic, args, *minibatch)
            average_processes(gradient)
            norm = gradient.norm()
            parameters.grad = gradient * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            optimizer.step()  # line 24
            grad_norms.append(norm)
            all_stats.append(stats)
        if args.target_kl is not None and average_processes(all_stats[-1][3].clone()) > args.target_kl:
            break

    stats = torch.stack(all_stats)
    variance = returns.var()
    return {
        "losses/policy_loss": stats[-1, 0].item(),
        "losses/value_loss": stats[-1, 1].item(),
        "losses/old_approx_kl": stats[-1, 2].item(),
        "losses/approx_kl": stats[-1, 3].item(),
        "losses/clipfrac": stats[:, 4].mean().item(),
        "losses/entropy": -rollout.log_probs.mean().item(),  # of the policy that acted, from its own samples
        "losses/explained_variance": (1 - (returns - rollout.values).var() / variance).item() if variance > 0 else 0.0,
        "losses/grad_norm": torch.stack(grad_norms).mean().item(),
    }


def average_processes(x: torch.Tensor) -> torch.Tensor:
    """Data parallelism: replace `x` by its mean over all processes. Alone, nothing happens."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def gather_processes(mine) -> list:
    """What each process holds, in the order of their ranks."""
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def agree_on(number: int) -> int:
    """The largest `number` of all processes."""
    largest = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint
# ----------------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write atomically: whoever reads `path`, whenever, finds a whole checkpoint."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, policy_class: Optional[type] = None, flag: str = "--evaluate") -> dict:
    """Read a checkpoint, given as its file or its run folder.

    Only tensors and plain values are read (`weights_only=True`), so a stranger's file cannot run code.

    Raises:
        BadInput: naming `flag`, if there is none, it cannot be read, or it holds another class than `policy_class`.
    """
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise BadInput(f"{flag} is {path}, which holds no checkpoint; allowed is a run folder or its checkpoint.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        found = checkpoint["policy_class"]
    except Exception as error:
        # torch.load has no error class of its own: a truncated file raises one of a dozen kinds.
        raise BadInput(f"{flag} is {path}, whose checkpoint is truncated or not of this script") from error
    if policy_class is not None and found != policy_class.__name__:
        raise BadInput(f"{flag} is {path}, which holds a {found}; this script trains {policy_class.__name__}")
    return checkpoint


def random_state(device: torch.device) -> dict:
    """The states of all random number generators that this process uses."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


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


class DeployedPolicy(nn.Module):
    """What a robot runs: raw observations (..., obs_dim) in, actions (..., action_dim) clipped to the Box out.

    Infinite and huge observations are clipped too. NaN is not: one in an observation makes all of its actions NaN, so
    check the sensors before, or the actions after.
    """

    def __init__(self, policy: nn.Module, obs_stats: RunningMeanStd, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.policy = policy
        # In float64 as in training: a mean much larger than the deviation would cost float32 its digits.
        self.register_buffer("mean", torch.as_tensor(obs_stats.mean))
        self.register_buffer("std", torch.as_tensor(obs_stats.std))
        self.register_buffer("low", torch.as_tensor(low).float())
        self.register_buffer("high", torch.as_tensor(high).float())

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.act(obs, temperature=0.0)

    def act(self, obs: torch.Tensor, temperature: float) -> torch.Tensor:
        obs = ((obs - self.mean) / self.std).clamp(-10, 10).float()
        action, _ = self.policy.sample(obs, temperature=temperature)
        return torch.minimum(torch.maximum(action, self.low), self.high)


def evaluate(
    checkpoint: str | Path,
    policy_class: type = FlowPolicy,
    eval_episodes: int = 10,
    temperature: float = 0.0,
    seed: int = 1,
    capture_video: bool = False,
    export_onnx: Optional[str] = None,
) -> list[float]:
    """Play a trained policy with its observation statistics frozen; print and return undiscounted episode returns.

    Args:
        checkpoint: run folder or checkpoint file.
        policy_class: class that the checkpoint was trained with.
        temperature: factor on the standard deviation of the base noise; 0 is the deterministic policy.
        seed: of the environment and the noise; the same seed gives the same returns.
        capture_video: film every episode into the folder `videos` beside the checkpoint.
        export_onnx: file to write the deterministic policy to.

    Raises:
        BadInput: for a checkpoint that is missing, truncated or of another policy.
        WrongExport: for an exported file that computes something else than the policy; the returns are printed by then.
    """
    state = load_checkpoint(checkpoint, policy_class)
    args = Args(**state["args"])
    check_env(args.env_id)
    run_dir = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    video_dir = run_dir / "videos" if capture_video and can_render(args.env_id) else None
    # The prefix keeps films of other training steps and temperatures.
    prefix = f"eval-step{state['global_step']}-temperature{temperature:g}"
    env = make_env(args.env_id, 0, video_dir, prefix, episode_trigger=lambda episode: True)()

    obs_stats = RunningMeanStd()
    obs_stats.load_state_dict(state["processes"][0]["collector"]["obs_stats"])
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten, the caller's numbers must not be
        policy = make_policy(policy_class, env.observation_space.shape[0], env.action_space.shape[0], args)
    try:
        policy.load_state_dict(state["policy"])
    except RuntimeError as error:
        raise BadInput(
            f"--evaluate is {checkpoint}, whose {policy_class.__name__} does not fit {args.env_id}"
        ) from error
    deployed = DeployedPolicy(policy, obs_stats, env.action_space.low, env.action_space.high).eval()

    returns, seen = [], []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for episode in range(eval_episodes):
            obs, _ = env.reset(seed=seed if episode == 0 else None)
            episode_return, done = 0.0, False
            while not done:
                if len(seen) < 256:
                    seen.append(obs)
                action = deployed.act(torch.from_numpy(obs)[None], temperature)[0]
                obs, reward, terminated, truncated, _ = env.step(action.numpy())
                episode_return += float(reward)
                done = terminated or truncated
            returns.append(episode_return)
    env.close()
    print(
        f"{eval_episodes} episodes of {args.env_id} at temperature {temperature:g}: "
        f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}"
    )
    if video_dir:
        print(f"Films of {eval_episodes} episodes are in {video_dir}")
    if export_onnx:
        to_onnx(deployed, export_onnx, np.stack(seen))
    return returns


class WrongExport(RuntimeError):
    """An exported file computes something else than the policy; `main` prints it as one line, exit status 1."""


def to_onnx(deployed: DeployedPolicy, path: str, obs: np.ndarray) -> float:
    """Write `deployed` as ONNX, float32 (batch, obs_dim) to float32 (batch, action_dim), and compare both on `obs`.

    Returns the largest difference, of actions above 1 as a share of them. Raises `WrongExport` if it is above 1e-5:
    such a file must not reach a robot.
    """
    import onnxruntime

    obs = torch.from_numpy(obs).float()
    program = torch.onnx.export(
        deployed,
        (obs[:2],),
        input_names=["obs"],
        output_names=["action"],
        dynamic_shapes={"obs": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    temporary = path + ".tmp"
    program.save(temporary, external_data=False)
    session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        actions = deployed(obs).numpy()
    # Of actions above 1 a share: float32 has seven digits.
    difference = (np.abs(session.run(None, {"obs": obs.numpy()})[0] - actions) / np.abs(actions).clip(1)).max()
    if not difference <= 1e-5:
        os.remove(temporary)
        raise WrongExport(f"{path} differs from the PyTorch policy by {difference:.1e}, allowed is 1e-5")
    os.replace(temporary, path)
    print(f"Wrote {path}; on {len(obs)} observations it differs from the PyTorch policy by {difference:.1e} at most.")
    return float(difference)


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
            self.bar.set_postfix_str(f"return {episodic_return:.0f}, KL {kl:.3f}", refresh=False)
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
        self.number, self.process = 0, os.getpid()
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            self.previous = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number, _frame) -> None:
        if os.getpid() != self.process:  # a worker of --async-envs, which inherited this handler
            if number == signal.SIGTERM:  # from its parent; a terminal's Ctrl-C reaches all, and the parent decides
                os._exit(128 + number)
            return
        self.number = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class NonFinite(ArithmeticError):
    """Training left the finite numbers; `main` prints it as one line and exits with status 3."""


class CallWith(nn.Module):
    """A function as the `forward` of a module, together with the networks that it uses."""

    def __init__(self, function, *networks: nn.Module):
        super().__init__()
        self.function, self.networks = function, nn.ModuleList(networks)

    def forward(self, *inputs):
        return self.function(*inputs)


def compile_ahead(function, networks: tuple[nn.Module, ...], inputs: tuple[torch.Tensor, ...]):
    """`function` compiled ahead of time for inputs of exactly these shapes; it must return a tuple of tensors.

    `torch.compile` would make the same kernels, but at each call its guards and wrappers cost more than networks this
    small, and push the simulator out of the processor's caches. The networks' tensors are inputs of the compiled
    library, so that it computes with what they are at the time of a call.

    Raises whatever the compiler does, and `AssertionError` where what it made computes something else.
    """
    module = CallWith(function, *networks)
    state = {name: x.detach() for name, x in (*module.named_parameters(), *module.named_buffers())}
    trained = {name for name, x in module.named_parameters() if x.requires_grad}

    def with_state(tensors, *inputs):
        given = {name: x.detach().requires_grad_(name in trained) for name, x in zip(state, tensors)}
        return tuple(functional_call(module, given, inputs))

    tensors = list(state.values())
    graph = make_fx(with_state)(tensors, *inputs)  # gradients are operations like others in here
    kinds = [(x.shape, x.stride(), x.dtype, x.device.type) for x in (*tensors, *inputs)]
    constants = [x.tolist() for x in graph.buffers()]
    # The compiler uses whatever this processor has, and a cache may lie on a disk that a whole cluster sees.
    machine = torch.__version__, sorted(torch.cpu.get_capabilities().items()), torch.get_num_threads()
    recipe = repr((machine, graph.code, kinds, constants))
    package = Path(cache_dir(), f"nfpo-{hashlib.sha256(recipe.encode()).hexdigest()}.pt2")
    if not package.exists():
        temporary = package.with_name(f"nfpo-{os.getpid()}.pt2")
        program = torch.export.export(graph, (tensors, *inputs))
        options = {"fallback_random": True}  # draw the random numbers that eager mode draws
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=options)
        os.replace(temporary, package)
    library = torch._inductor.aoti_load_package(str(package)).loader

    def compiled(*inputs):
        return library.run([*tensors, *inputs])

    torch.manual_seed(0)
    expected = function(*inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(tuple(compiled(*inputs)), tuple(expected), rtol=1e-3, atol=1e-4)
    return compiled


def compile_functions(policy, critic, args: Args, obs_dim: int, action_dim: int, device: torch.device):
    """`policy.sample` and `minibatch_gradient`, compiled where there is a compiler: the same functions, only faster."""
    if not args.compile:
        return policy.sample, minibatch_gradient
    print("Compiling; the first time on a machine this takes up to a minute (--no-compile starts at once).", flush=True)
    before, validates = random_state(device), torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)  # values are not known while a graph is made
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, about itself
            sample = compile_ahead(policy.sample, (policy,), (torch.randn(args.num_envs, obs_dim, device=device),))
            obs = torch.randn(args.minibatch_size, obs_dim, device=device)
            actions, log_probs = policy.sample(obs)
            noise, *others = torch.randn(4, args.minibatch_size, device=device)
            minibatch = obs, actions, log_probs + 0.1 * noise, *others
            with torch.enable_grad():
                gradient = compile_ahead(partial(minibatch_gradient, policy, critic, args), (policy, critic), minibatch)
    except Exception as error:
        # The compiler's errors are its own and change with versions; none of them may cost anybody a training run.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"PyTorch's compiler does not work here ({reason}): going on eagerly, slower.")
        return policy.sample, minibatch_gradient
    finally:
        set_random_state(before, device)
        torch.distributions.Distribution.set_default_validate_args(validates)
    return sample, lambda policy, critic, args, *minibatch: gradient(*minibatch)


def train(args: Args, policy_class: type = FlowPolicy) -> dict:
    """Train as `args` say and return final metrics, `run_dir` among them.

    `policy_class(obs_dim, action_dim)` is any `nn.Module` with `sample` and `log_prob` as in `FlowPolicy`.

    Raises:
        BadInput: with nothing left behind.
        NonFinite: where losses, parameters or actions stop being numbers; the last good checkpoint is kept.
    """
    distributed = "RANK" in os.environ  # started by torchrun
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local_rank = (int(os.environ[name]) for name in names) if distributed else (0, 1, 0)
    if args.resume is not None:
        found, _ = read_args(args.resume)
        if found != policy_class.__name__:  # said before a flag that only the other policy has is said to be wrong
            raise BadInput(f"--resume is {args.resume}, a run of {found}; this script trains {policy_class.__name__}")
    check_args(args, policy_class, world_size)
    check_env(args.env_id)
    stop = StopSignal()
    torch.set_num_threads(args.torch_threads)
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    device = torch.device("cuda", local_rank) if args.cuda else torch.device("cpu")
    if distributed:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.cuda else "gloo")
    envs, run_dir = None, None
    try:
        draws = args.capture_video and rank == 0 and can_render(args.env_id)
        run_dir, checkpoint = open_run(args, policy_class, rank, world_size)
        global_step = checkpoint["global_step"] if checkpoint else 0
        envs = make_envs(args, rank, run_dir / "videos" if draws else None, f"train-step{global_step}")
        return train_loop(args, policy_class, envs, device, run_dir, checkpoint, rank, world_size, stop)
    except BadInput:
        if rank == 0 and run_dir and not args.resume:  # Weights & Biases refuses only once there is a folder
            shutil.rmtree(run_dir)
        raise
    finally:
        if envs is not None:
            envs.close()
        stop.restore()
        if distributed:
            dist.destroy_process_group()


def open_run(args: Args, policy_class: type, rank: int, world_size: int) -> tuple[Path, Optional[dict]]:
    """The run's folder, made anew or resumed, and the checkpoint to continue from, if there is one."""
    if args.resume is not None:
        run_dir, checkpoint = Path(args.resume), None
        if (run_dir / "checkpoint.pt").exists():
            checkpoint = load_checkpoint(run_dir, policy_class, "--resume")
            for name, value in checkpoint["args"].items():
                if name not in resume_flags(args) and value != getattr(args, name):
                    raise BadInput(
                        f"--resume is {run_dir}, whose checkpoint was made with {as_flag(name)} {value} and whose "
                        f"args.json says {getattr(args, name)}"
                    )
            if len(checkpoint["processes"]) != world_size:
                raise BadInput(
                    f"--resume is {run_dir}, a run of {len(checkpoint['processes'])} processes, not of {world_size}; "
                    "start it with as many"
                )
            if args.total_timesteps < checkpoint["global_step"]:
                done = f"the {checkpoint['global_step']} steps that {run_dir} has done"
                raise BadInput(f"--total-timesteps is {args.total_timesteps}, allowed is at least {done}")
        if rank == 0:
            cut_event_files(run_dir, checkpoint["event_files"] if checkpoint else {})
            _, saved = read_args(args.resume)
            write_args(run_dir, policy_class, {**saved, "total_timesteps": args.total_timesteps})
        return run_dir, checkpoint
    message = [None]
    if rank == 0:
        try:
            message = [str(new_run_dir(args, policy_class))]
        except BadInput as error:
            message = [error]  # all processes have to end, not this one alone
    if world_size > 1:
        dist.broadcast_object_list(message)
    if isinstance(message[0], BadInput):
        raise message[0]
    return Path(message[0]), None


def new_run_dir(args: Args, policy_class: type) -> Path:
    """Make the run's folder with its arguments in it, both at once: a run killed at any moment can be resumed."""
    temporary = Path(args.runs_dir, f".new-{os.getpid()}-{time.time_ns()}")
    try:
        temporary.mkdir(parents=True)
        write_args(temporary, policy_class, dataclasses.asdict(args))
    except OSError as error:
        raise BadInput(f"--runs-dir is {args.runs_dir}, allowed is a folder to write to: {error}") from error
    for now in itertools.count(int(time.time())):  # a second run in the same second takes the next one
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{now}".replace("/", "-").replace(":", "-")
        try:
            return temporary.rename(Path(args.runs_dir, name))
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                shutil.rmtree(temporary)
                raise BadInput(f"--exp-name is {args.exp_name}, allowed is a part of a file name: {error}") from error


def write_args(run_dir: Path, policy_class: type, args: dict) -> None:
    """Write args.json, atomically: a run that lost it could not be resumed."""
    temporary = run_dir / "args.tmp"
    temporary.write_text(json.dumps({"policy_class": policy_class.__name__, **args}, indent=2) + "\n")
    temporary.replace(run_dir / "args.json")


def train_loop(args, policy_class, envs, device, run_dir, checkpoint, rank, world_size, stop: StopSignal) -> dict:
    """Algorithm 1, with everything around it. Called by `train`."""
    is_main = rank == 0
    iteration, global_step = (checkpoint["iteration"], checkpoint["global_step"]) if checkpoint else (0, 0)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)  # every process starts from the same networks
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    policy = make_policy(policy_class, obs_dim, action_dim, args).to(device)
    critic = Critic(obs_dim).to(device)
    parameters = flatten_parameters(parameters_of(policy, critic))
    optimizer = torch.optim.Adam([parameters], lr=args.learning_rate, eps=1e-5, fused=True)
    torch.manual_seed(args.seed + rank)  # and from here on has noise and minibatches of its own
    collector = Collector(envs, args.gamma, device)
    env_seed = args.seed + rank * args.num_envs
    recent = deque(maxlen=100)  # returns of the last episodes
    # What all processes agree on; what each sees from here on, the resets included, is merged after the iteration.
    agreed = collector.stats()
    if checkpoint is None:
        collector.reset(env_seed)
    else:
        policy.load_state_dict(checkpoint["policy"])
        critic.load_state_dict(checkpoint["critic"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        recent.extend(checkpoint["recent_returns"])
        mine = checkpoint["processes"][rank]
        envs.reset(seed=env_seed)  # before their state is restored, environments must have been reset once
        restored = collector.load_state_dict(mine["collector"])
        agreed = collector.stats()
        if not restored:
            collector.reset(env_seed + global_step)
            if is_main:
                print(f"{args.env_id} cannot be restored within an episode: its episodes start anew.")
        set_random_state(mine["random"], device)
    sample, gradient_fn = compile_functions(policy, critic, args, obs_dim, action_dim, device)

    writer = open_logs(args, run_dir, new=checkpoint is None) if is_main else None
    num_iterations = args.num_iterations(world_size)
    steps_per_iteration = args.batch_size * world_size
    progress = Progress(num_iterations * steps_per_iteration, global_step, enabled=is_main)
    saved_iteration, metrics, sps, start_time = iteration, {}, 0, time.time()
    stop_signal = 0  # read once an iteration, so that all processes, and saving and leaving, agree on it

    def mean_return() -> float:
        return float(np.mean(recent)) if recent else float("nan")

    try:
        while iteration < num_iterations and not stop_signal:
            iteration += 1
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate
            rollout, episodes = collect_rollout(collector, sample, critic, args.num_steps)
            metrics = ppo_update(policy, critic, optimizer, rollout, args, gradient_fn)
            broken = [name for name, value in metrics.items() if not math.isfinite(value)]
            if broken or not torch.isfinite(parameters).all():
                raise NonFinite(f"{broken[0] if broken else 'a parameter'} is not finite")
            if world_size > 1:
                collector.obs_stats.merge_processes(agreed[0])
                collector.normalize_reward.stats.merge_processes(agreed[1])
                agreed = collector.stats()
            episodes = sorted(sum(gather_processes(episodes), []))
            recent.extend(episodic_return for _, episodic_return, _ in episodes)
            episodes = [(global_step + step * args.num_envs * world_size, *rest) for step, *rest in episodes]
            global_step += steps_per_iteration
            sps = progress.update(global_step, mean_return(), metrics["losses/approx_kl"])
            if hasattr(policy, "diagnostics"):  # on every eighth transition: enough for a mean
                metrics |= policy.diagnostics(rollout.obs.flatten(0, 1)[::8], rollout.actions.flatten(0, 1)[::8])
            metrics |= {"charts/learning_rate": optimizer.param_groups[0]["lr"], "charts/SPS": sps}
            if is_main:
                log_iteration(writer, episodes, metrics, global_step)

            stop_signal = agree_on(stop.number)
            is_kept = args.keep_interval is not None and iteration % args.keep_interval == 0
            is_due = (iteration - 1) % args.checkpoint_interval == 0 or iteration == num_iterations
            if is_due or is_kept or stop_signal:
                processes = gather_processes({"collector": collector.state_dict(), "random": random_state(device)})
                if is_main:
                    writer.flush()
                    checkpoint = {
                        "policy_class": policy_class.__name__,
                        "args": dataclasses.asdict(args),
                        "iteration": iteration,
                        "global_step": global_step,
                        # Copies, or each would bring along the whole vector that it is a view of.
                        "policy": {name: x.clone() for name, x in policy.state_dict().items()},
                        "critic": {name: x.clone() for name, x in critic.state_dict().items()},
                        "optimizer": optimizer.state_dict(),
                        "recent_returns": list(recent),
                        "processes": processes,
                        "event_files": event_files(run_dir),
                    }
                    if is_kept:
                        save_checkpoint(run_dir / f"checkpoint-{global_step}.pt", checkpoint)
                    save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
                saved_iteration = iteration
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
        "episodic_return": mean_return(),
        "stop_signal": stop_signal,
        **metrics,
    }


def open_logs(args: Args, run_dir: Path, new: bool) -> SummaryWriter:
    """TensorBoard's writer, mirrored to Weights & Biases with --track."""
    if args.track:
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
    writer = SummaryWriter(str(run_dir))
    if new:
        rows = "\n".join(f"|{name}|{value}|" for name, value in dataclasses.asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    return writer


def log_iteration(writer: SummaryWriter, episodes: list, metrics: dict[str, float], global_step: int) -> None:
    """Write the (step, return, length) of episodes that ended, and the update's metrics."""
    for step, episodic_return, length in episodes:
        writer.add_scalar("charts/episodic_return", episodic_return, step)
        writer.add_scalar("charts/episodic_length", length, step)
    for name, value in metrics.items():
        writer.add_scalar(name, value, global_step)


def print_summary(run_dir: Path, global_step: int, sps: int, seconds: float, recent: deque, stop_signal: int) -> None:
    command = f"python {sys.argv[0]}"
    if recent:
        print(f"Last {len(recent)} episodes: return {np.mean(recent):.1f} ± {np.std(recent):.1f}")
    print(f"{global_step} steps; this session took {seconds:.0f} s at {sps} steps/s. Everything is in {run_dir}")
    if stop_signal:
        again = f"torchrun, as before, {sys.argv[0]}" if dist.is_initialized() else command
        print(f"Stopped by {signal.Signals(stop_signal).name} and saved. Continue: {again} --resume {run_dir}")
        return
    print(f"  evaluate  {command} --evaluate {run_dir}")
    print(f"  film      {command} --evaluate {run_dir} --capture-video")
    print(f"  export    {command} --evaluate {run_dir} --export-onnx policy.onnx")
    print(f"  curves    tensorboard --logdir {run_dir.parent}")


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
        _, saved = read_args(path)
    else:
        saved = {
            **load_checkpoint(path, policy_class)["args"],
            "capture_video": False,
        }  # whether training was filmed says nothing
    try:
        saved = Args(**saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # tyro only warns of a default of another type
            args = tyro.cli(Args, args=argv, default=saved, description=description)
    except (TypeError, UserWarning) as error:
        reason = str(error).split(". ")[0]
        raise BadInput(f"{flag} is {path}, a run with other arguments than this script's: {reason}") from error
    free = resume_flags(saved) if resumes else EVALUATE_FLAGS
    for name, value in dataclasses.asdict(args).items():
        if name not in free and value != getattr(saved, name):
            why = " (its learning rate is annealed over them)" if name == "total_timesteps" and resumes else ""
            raise BadInput(
                f"{as_flag(name)} is {value}, but {path} was run with {getattr(saved, name)}{why}; leave the flag out"
            )
    return args


def main(policy_class: type = FlowPolicy, defaults: Optional[Args] = None) -> None:
    """The command line: train, resume or evaluate."""
    try:
        args = parse_args(defaults=defaults, policy_class=policy_class)
        if args.evaluate is not None:
            check_args(args, policy_class)
            torch.set_num_threads(args.torch_threads)
            evaluate(
                args.evaluate,
                policy_class,
                args.eval_episodes,
                args.temperature,
                args.seed,
                args.capture_video,
                args.export_onnx,
            )
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
