"""Distillation losses and methods, one file per family.

Importing a file registers its methods; `METHODS` holds all of them by name.
"""

from richkd.losses.crd import CRD as CRD
from richkd.losses.crd import CRDKD as CRDKD
from richkd.losses.crd import CRDLoss as CRDLoss
from richkd.losses.dist import DIST as DIST
from richkd.losses.dist import dist_loss as dist_loss
from richkd.losses.dkd import DKD as DKD
from richkd.losses.dkd import dkd_loss as dkd_loss
from richkd.losses.kd import CE as CE
from richkd.losses.kd import KD as KD
from richkd.losses.kd import kd_loss as kd_loss
from richkd.losses.kd import standardize as standardize
from richkd.losses.method import EVERY as EVERY
from richkd.losses.method import METHODS as METHODS
from richkd.losses.method import Batch as Batch
from richkd.losses.method import Method as Method
from richkd.losses.method import Task as Task
from richkd.losses.method import describe_method as describe_method
from richkd.losses.method import method_class as method_class
from richkd.losses.method import method_options as method_options
from richkd.losses.mlkd import MLKD as MLKD
from richkd.losses.multi import AVER as AVER
from richkd.losses.multi import CAMKD as CAMKD
from richkd.losses.multi import EBKD as EBKD
from richkd.losses.multi import confidence_weights as confidence_weights
from richkd.losses.multi import entropy_weights as entropy_weights
from richkd.losses.multi import weighted_kd_loss as weighted_kd_loss
from richkd.losses.relational import PKT as PKT
from richkd.losses.relational import RKD as RKD
from richkd.losses.relational import SP as SP
from richkd.losses.relational import pkt_loss as pkt_loss
from richkd.losses.relational import rkd_loss as rkd_loss
from richkd.losses.relational import sp_loss as sp_loss
from richkd.losses.richkd import RichKD as RichKD
from richkd.losses.vid import VID as VID
from richkd.losses.vid import VIDLoss as VIDLoss
