"""MAML evaluation with higher; the model is put into eval before the query predictions."""
import torch
import torch.nn as nn
import torch.nn.functional as F
import higher

torch.manual_seed(0)
torch.set_num_threads(1)


class DropNet(nn.Module):
    def __init__(self, n_way=4):
        super().__init__()
        self.fc1 = nn.Linear(16, 64)
        self.fc2 = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.5)
        self.fc3 = nn.Linear(64, n_way)

    def forward(self, x):
        x = self.drop(F.relu(self.fc1(x)))
        x = self.drop(F.relu(self.fc2(x)))
        return self.fc3(x)


def episode():
    c = torch.randn(4, 16)
    y = torch.arange(4).repeat(5)
    return (c[y] + 0.5 * torch.randn(20, 16), y), (c[y] + 0.5 * torch.randn(20, 16), y)


def main():
    model = DropNet()
    inner_opt = torch.optim.SGD(model.parameters(), lr=0.1)
    meta_opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    for it in range(12):
        (xs, ys), (xq, yq) = episode()
        model.train()
        meta_opt.zero_grad()
        with higher.innerloop_ctx(model, inner_opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(5):
                support = F.cross_entropy(fmodel(xs), ys)
                diffopt.step(support)
            model.eval()
            logits = fmodel(xq)
            query = F.cross_entropy(logits, yq)
            query.backward()
        meta_opt.step()
        acc = (logits.argmax(1) == yq).float().mean().item()
        print(f"it {it} support {support.item():.3f} query {query.item():.3f} acc {acc:.2f}")


if __name__ == "__main__":
    main()
