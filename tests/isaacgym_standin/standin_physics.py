"""The physics of the stand-in's tasks, batched in PyTorch: what is simulated, without how a package hands it out."""

import torch


class CartPole:
    """A pole on a cart, pushed by one force. The episode is lost when the pole falls or the cart leaves its track."""

    num_obs, num_privileged_obs, num_actions = 5, 6, 1
    dt, max_episode_length = 0.02, 200

    def __init__(self, num_envs: int, device: str):
        self.state = torch.zeros(num_envs, 4, device=device)  # position, velocity, angle, angular velocity
        self.force = torch.zeros(num_envs, device=device)

    def reset(self, indexes: torch.Tensor) -> None:
        self.state[indexes] = 0.2 * torch.rand(len(indexes), 4, device=self.state.device) - 0.1
        self.force[indexes] = 0.0

    def step(self, actions: torch.Tensor) -> None:
        """The equations of Barto, Sutton and Anderson (1983), without friction; semi-implicit Euler."""
        gravity, cart, pole, half_length = 9.8, 1.0, 0.1, 0.5
        self.force = 10.0 * actions[:, 0].clamp(-1, 1)
        x, velocity, angle, rate = self.state.unbind(1)
        sin, cos, total = angle.sin(), angle.cos(), cart + pole
        push = (self.force + pole * half_length * rate**2 * sin) / total
        acceleration = gravity * sin - cos * push
        acceleration = acceleration / (half_length * (4 / 3 - pole * cos**2 / total))
        velocity = velocity + self.dt * (push - pole * half_length * acceleration * cos / total)
        rate = rate + self.dt * acceleration
        self.state = torch.stack((x + self.dt * velocity, velocity, angle + self.dt * rate, rate), 1)

    def obs(self) -> torch.Tensor:
        x, velocity, angle, rate = self.state.unbind(1)
        return torch.stack((x, velocity, angle.sin(), angle.cos(), rate), 1)

    def privileged_obs(self) -> torch.Tensor:
        return torch.cat((self.obs(), self.force[:, None] / 10.0), 1)

    def rewards(self) -> dict:
        """The terms of the reward, each (N,)."""
        return {"alive": torch.full_like(self.force, self.dt), "upright": -self.dt * self.state[:, 2].abs()}

    def failed(self) -> torch.Tensor:
        return (self.state[:, 2].abs() > 0.2) | (self.state[:, 0].abs() > 2.4)


class PointMass:
    """A mass in the plane, pushed towards a target. Its episodes end by the time limit alone."""

    num_obs, num_privileged_obs, num_actions = 6, None, 2
    dt, max_episode_length = 0.05, 60

    def __init__(self, num_envs: int, device: str):
        self.position, self.velocity, self.target = torch.zeros(3, num_envs, 2, device=device)

    def reset(self, indexes: torch.Tensor) -> None:
        like = {"size": (len(indexes), 2), "device": self.position.device}
        self.position[indexes], self.target[indexes] = 2 * torch.rand(**like) - 1, 2 * torch.rand(**like) - 1
        self.velocity[indexes] = 0.0

    def step(self, actions: torch.Tensor) -> None:
        self.velocity = 0.9 * self.velocity + 4.0 * self.dt * actions.clamp(-1, 1)
        self.position = self.position + self.dt * self.velocity

    def obs(self) -> torch.Tensor:
        return torch.cat((self.position, self.velocity, self.target), 1)

    def rewards(self) -> dict:
        return {"near": self.dt * (-2.0 * (self.position - self.target).norm(dim=1)).exp()}

    def failed(self) -> torch.Tensor:
        return torch.zeros(len(self.position), dtype=torch.bool, device=self.position.device)
