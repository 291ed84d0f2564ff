from . import benchmarks as benchmarks
from . import errors as errors
from . import zoo as zoo
from .align import AlignerConfig as AlignerConfig
from .align import fit_aligner as fit_aligner
from .data import ActivationStore as ActivationStore
from .data import Behaviour as Behaviour
from .data import Chat as Chat
from .data import ContrastPairs as ContrastPairs
from .evaluation import evaluate as evaluate
from .files import export as export
from .files.io import load as load
from .files.io import push_to_hub as push_to_hub
from .files.io import save as save
from .hosts import as_host as as_host
from .hosts import capture as capture
from .hosts.loading import load_model as load_model
from .learn import RFMConfig as RFMConfig
from .learn import directions as directions
from .learn import fit_rfm as fit_rfm
from .pair import MIConfig as MIConfig
from .pair import PairingConfig as PairingConfig
from .pair import layer_pair_mi as layer_pair_mi
from .pair import select_layer_pairs as select_layer_pairs
from .pipeline import ExpertSteer as ExpertSteer
from .pipeline import ExpertSteerConfig as ExpertSteerConfig
from .pipeline import label_texts as label_texts
from .steer import SteeringPlan as SteeringPlan

__version__: str
__all__: list[str]

# Folders, imported when they are named: `esl.steer.RunReport`.
from . import align as align
from . import data as data
from . import evaluation as evaluation
from . import files as files
from . import hosts as hosts
from . import interventions as interventions
from . import learn as learn
from . import measure as measure
from . import pair as pair
from . import pipeline as pipeline
from . import show as show
from . import steer as steer

# In a folder now, see `_moved.IN_FOLDERS`.
from .align import Aligner as Aligner
from .evaluation import Evaluation as Evaluation
from .hosts import capture_tensors as capture_tensors
from .hosts import Host as Host
from .interventions import edits as edits
from .interventions import fit_gate as fit_gate
from .interventions import Gate as Gate
from .learn import RFM as RFM
from .measure import calibrate as calibrate
from .pipeline import ExpertSteering as ExpertSteering
from .show import plots as plots
from .steer import RunReport as RunReport
from .steer import SteeringVector as SteeringVector
