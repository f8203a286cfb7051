"""Stand-in for IsaacGymEnvs, see ../README.md."""


def make(
    seed,
    task,
    num_envs,
    sim_device,
    rl_device,
    graphics_device_id=-1,
    headless=False,
    multi_gpu=False,
    force_render=True,
):
    """As in the real one, `seed` reaches nothing."""
    from isaacgymenvs.tasks import isaacgym_task_map

    return isaacgym_task_map[task](num_envs, rl_device)
