"""Distillation losses and the methods made of them, one file a family."""

from richkd.losses.crd import CRD as CRD
from richkd.losses.crd import CRDLoss as CRDLoss
from richkd.losses.kd import CE as CE
from richkd.losses.kd import KD as KD
from richkd.losses.kd import kd_loss as kd_loss
from richkd.losses.method import METHODS as METHODS
from richkd.losses.method import Batch as Batch
from richkd.losses.method import Method as Method
from richkd.losses.method import Widths as Widths
from richkd.losses.method import method_class as method_class
from richkd.losses.richkd import RichKD as RichKD
