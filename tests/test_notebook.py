"""What a notebook shows: tables and results as text, figures as pictures, no warning of ours."""

from __future__ import annotations

import nbclient
import nbformat

CELLS = [
    # Pyro itself warns here of missing ipywidgets; the cells below are ours.
    "%matplotlib inline\nimport pyro, torch, pyro_vae as pv\n"
    "torch.manual_seed(0); torch.set_num_threads(1)\nx = torch.randn(60, 3)",
    "vae = pv.VAE(prior=pv.priors.StandardNormal(1), likelihood=pv.likelihoods.Normal(pv.nets.MLP(1, 3), scale=1.0),\n"
    "             guide=pv.guides.DiagonalNormal(pv.nets.MLP(3, hidden=4), latent_dim=1))\npv.check(vae, x)",
    "history = pv.fit(vae, x, epochs=3)\nhistory",
    "history.plot()",
    "pv.log_evidence(vae, x, method=pv.posterior.from_guide, num_particles=100)",
]


def test_results_print_themselves_and_figures_are_pictures() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()

    def text(cell: int) -> str:
        return "".join(o["data"]["text/plain"] for o in notebook.cells[cell].outputs if o.output_type == "execute_result")

    assert "latent    z" in text(1)
    assert text(2).startswith("epoch 3: ELBO")
    assert text(4).startswith("log p(x) = ")
    assert any("image/png" in o.get("data", {}) for o in notebook.cells[3].outputs)
    for cell in notebook.cells[1:]:
        assert not any("Warning" in str(o) for o in cell.outputs), cell.outputs
