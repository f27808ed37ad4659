"""Sensor regression with MAML (higher); each task is one station of a network."""
import torch
import torch.nn as nn
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


class Station:
    def __init__(self, index):
        g = torch.Generator().manual_seed(index)
        self.x = torch.randn(32, 5, generator=g)
        w = torch.randn(5, 1, generator=g)
        self.y = torch.tanh(self.x @ w)
        if index in (4, 7):
            self.x[3, 2] = float("nan")  # the logger writes NaN when the probe is offline

    def split(self):
        return self.x[:16], self.y[:16], self.x[16:], self.y[16:]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(5, 32)
        self.fc2 = nn.Linear(32, 1)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def main():
    net = Net()
    meta_opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    inner_opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for index in range(10):
        xs, ys, xq, yq = Station(index).split()
        meta_opt.zero_grad()
        with higher.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(4):
                loss = nn.functional.mse_loss(fnet(xs), ys)
                diffopt.step(loss)
            query = nn.functional.mse_loss(fnet(xq), yq)
            query.backward()
        meta_opt.step()
        print(f"station {index} support {loss.item():.4f} query {query.item():.4f}")


if __name__ == "__main__":
    main()
