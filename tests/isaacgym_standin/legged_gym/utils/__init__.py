"""The task registry."""

import argparse
import random

import numpy as np
import torch
from isaacgym import gymapi


def class_to_dict(obj):
    """Nested classes to nested dictionaries."""
    if not hasattr(obj, "__dict__"):
        return obj
    return {name: class_to_dict(getattr(obj, name)) for name in dir(obj) if not name.startswith("_")}


def get_args():
    """Parses the whole command line of whatever script is running, and ends it at an option that it does not know."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task")
    parser.add_argument("--headless", action="store_true")
    return parser.parse_args()


class TaskRegistry:
    def __init__(self):
        self.task_classes, self.env_cfgs, self.train_cfgs = {}, {}, {}

    def register(self, name, task_class, env_cfg, train_cfg):
        self.task_classes[name], self.env_cfgs[name], self.train_cfgs[name] = task_class, env_cfg, train_cfg

    def get_cfgs(self, name):
        env_cfg, train_cfg = self.env_cfgs[name], self.train_cfgs[name]
        env_cfg.seed = train_cfg.seed
        return env_cfg, train_cfg

    def make_env(self, name, args=None, env_cfg=None):
        if args is None:
            args = get_args()
        if env_cfg is None:
            env_cfg, _ = self.get_cfgs(name)
        if args.num_envs is not None:
            env_cfg.env.num_envs = args.num_envs
        for set_seed in (random.seed, np.random.seed, torch.manual_seed):
            set_seed(env_cfg.seed)
        assert args.physics_engine == gymapi.SIM_PHYSX and args.subscenes == 0 and args.num_threads >= 0
        assert args.use_gpu == args.use_gpu_pipeline == args.sim_device.startswith("cuda")
        return self.task_classes[name](env_cfg, args.sim_device, args.headless), env_cfg


task_registry = TaskRegistry()
