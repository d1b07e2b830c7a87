"""The zoo: small MoE modules composed from parts. ALL lists them; each part is one function or class.

spelling.py      the ways to write one step           routers.py      the grammar of routers
layouts.py       how expert weights are stored        activations.py  what lies between the matmuls
experts.py       the forms of the experts half        layer.py        a whole layer from a Recipe
zoo.py           the registry ALL                     lookalikes.py   what resembles a layer and is none
numbers.py       right or wrong, against float64      outcome.py      what the backend made of a module
language.py      whole language models
"""

from tests.models.zoo import ALL, Example

__all__ = ["ALL", "Example"]
