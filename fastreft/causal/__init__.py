"""Looking inside a model: interchange interventions, and the subspaces that stand for a causal model's variables (DAS).

    collect       hidden states at places and positions
    interchange   a forward in which they take a source's coordinates
    Subspace      R, a range of its rows a variable
    CausalModel   variables and functions, which make pairs with their counterfactual labels
    Das           a subspace at a place: trained, scored by IIA, saved
    sweep         Das over layers and positions, with a picture

Uses plan/, models/, ops/ and optim/; knows nothing of PEFT.
"""

from .causal_model import CausalModel, Pairs
from .das import Das
from .exchange import Kept, collect, interchange
from .subspace import Subspace, load
from .sweep import sweep

__all__ = ["CausalModel", "Das", "Kept", "Pairs", "Subspace", "collect", "interchange", "load", "sweep"]
