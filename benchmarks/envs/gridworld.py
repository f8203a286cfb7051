"""A board with several equally good goals, after the paper's Fig. 6 (Sec. 5.3), which follows McAllister et al. (2025).

Run:     python nfpo_continuous_action.py --env-id benchmarks.envs.gridworld:GridWorld-v0
"""

from typing import Optional

import gymnasium as gym
import numpy as np

SIZE = 7  # cells along each side
HALF = SIZE / 2
GOALS = np.array([(3, 0), (0, 3), (-3, 0), (0, -3)], dtype=np.float32)  # centers of the green cells
REACH = 0.5  # from a cell's center to its edges
START = np.zeros(2, dtype=np.float32)  # center of the grey cell
STEP_SIZE = 1.5  # cells
TIME_LIMIT = 12  # steps; the shortest way takes two
PIXELS = 32  # of a cell's side in a frame, which film encoders want to be even
WHITE, LINE, GREY, GREEN, RED = (255, 255, 255), (210, 210, 210), (160, 160, 160), (120, 200, 120), (200, 40, 40)


class GridWorld(gym.Env):
    """A point on a board of 7 x 7 cells that has to enter a green cell.

    Observation: the position (x, y) in cells, (0, 0) being the board's center. Box(-3.5, 3.5, (2,)), float32.
    Action: the displacement in units of 1.5 cells. Box(-1, 1, (2,)), float32; what lies outside is clipped.
    Start: the center of the grey cell, the same in every episode.
    Reward: 1 on entering a green cell, which terminates the episode, and 0 otherwise. 12 steps are the time limit.
    Info: `goal`, the index in `GOALS` of the green cell that was entered, -1 until then.

    The green cells are the middles of the four sides. From the start they are equally far and the board looks the same
    towards each, so that any distribution over them is optimal. They are not in the corners, because clipping would aim
    there: a Gaussian with a mean of zero and a huge deviation would hit all four. Between the middles of the sides a
    single Gaussian has to choose. The walls clip the position, so that no point is out of play.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    observation_space = gym.spaces.Box(-HALF, HALF, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, render_mode: Optional[str] = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = START.copy()
        return self.position.copy(), {"goal": -1}

    def step(self, action):
        displacement = STEP_SIZE * np.clip(action, -1, 1)
        self.position = np.clip(self.position + displacement, -HALF, HALF).astype(np.float32)
        entered = (np.abs(self.position - GOALS) <= REACH).all(-1)  # (goals,)
        goal = int(entered.argmax()) if entered.any() else -1
        return self.position.copy(), float(goal >= 0), goal >= 0, False, {"goal": goal}

    def render(self):
        """The board and, as a red dot, the point. -> (224, 224, 3) uint8, or None without a render mode."""
        if self.render_mode is None:
            return None
        frame = np.full((SIZE * PIXELS, SIZE * PIXELS, 3), WHITE, dtype=np.uint8)
        # The center of every pixel as a position; an image's first row is the top, where y is largest.
        x, y = np.meshgrid(*[(np.arange(SIZE * PIXELS) + 0.5) / PIXELS - HALF] * 2)
        pixels = np.stack([x, -y], axis=-1)
        for cell, color in ((START, GREY), *((goal, GREEN) for goal in GOALS)):
            frame[(np.abs(pixels - cell) <= REACH).all(-1)] = color
        frame[::PIXELS] = frame[:, ::PIXELS] = LINE
        frame[np.linalg.norm(pixels - self.position, axis=-1) <= 0.2] = RED
        return frame


gym.register("GridWorld-v0", GridWorld, max_episode_steps=TIME_LIMIT)
