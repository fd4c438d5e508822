"""Published methods, one file each, named as their papers name them."""

from jmeta.methods.aloe import ALOEInfo, ALOEState, EditSampler, aloe, linear_autoregressive
from jmeta.methods.anil import anil, learned_body
from jmeta.methods.bait import Selection, bait, point_factors
from jmeta.methods.bandits import exp3, ucb
from jmeta.methods.baselines import Baseline, leave_one_out, moving_average, no_baseline
from jmeta.methods.cavia import cavia, learned_context
from jmeta.methods.collapse import has_collapsed, monitors, panels
from jmeta.methods.diversity import Diversity, cross_diversity, diversity
from jmeta.methods.dps import DPSMixState, DPSState, dps, dps_mix
from jmeta.methods.dynamic_evaluation import (
    dynamic_evaluation,
    gradient_statistics,
    rms_towards_start,
    sgd_towards_start,
)
from jmeta.methods.fast_weights import FastWeights
from jmeta.methods.file_adaptation import first_order_tssa, tssa
from jmeta.methods.fisher import Labels, fisher, per_example, row_average, sampled, summed, tapped
from jmeta.methods.hidden_states import HiddenStateOptimizer, HiddenStates, hidden_states
from jmeta.methods.imaml import imaml, proximal_start
from jmeta.methods.knn_lm import (
    Datastore,
    Neighbours,
    activation_penalty,
    datastore,
    interpolate,
    knn_distribution,
    knn_log_likelihood,
    nearest,
)
from jmeta.methods.learned_mixture import (
    Mixture,
    learned_mixture,
    mixture_gradients,
    mixture_problem,
)
from jmeta.methods.maml import fomaml, learned_start, maml, plain_gradient, reptile
from jmeta.methods.maml_plus_plus import annealed, maml_plus_plus, maml_plus_plus_init
from jmeta.methods.mask_budget import within_budget
from jmeta.methods.meta_pseudo_labels import labelled_auxiliary, meta_pseudo_labels
from jmeta.methods.meta_sgd import learned_rates, meta_sgd, meta_sgd_init
from jmeta.methods.objective_sampler import (
    Sampler,
    SamplerState,
    Window,
    draw_objective,
    mometas,
    mometas_gradient,
    own_credit,
    relative_improvement,
    sampler,
    shared_credit,
)
from jmeta.methods.objective_training import (
    Objective,
    fresh_losses,
    objective_loss,
    one_of,
    paired_losses,
    sampled_training,
)
from jmeta.methods.populations import population, restarting
from jmeta.methods.relaxations import expected, gumbel_softmax, straight_through, unevaluated
from jmeta.methods.rewriting import (
    Rewriting,
    class_labels,
    inputs_and_labels,
    inputs_only,
    masks_only,
    replacements,
    without,
)
from jmeta.methods.rule_samplers import (
    annealed_mix,
    fixed_mix,
    loss_proportional,
    round_robin,
    uniform_mix,
)
from jmeta.methods.schedules import inverse_sqrt
from jmeta.methods.students import Student, TeacherState, direct_grad, fine_tuned
from jmeta.methods.task2vec import (
    Head,
    TaskEmbedding,
    cached_features,
    fit_head,
    load_embeddings,
    save_embeddings,
    task2vec,
    with_head,
)
from jmeta.methods.task_distances import DISTANCES, distance_matrix
from jmeta.methods.teacher import pre_training, soft_teacher
from jmeta.methods.teacher_auxiliary import mlm_auxiliary, two_head_loss
from jmeta.methods.teacher_checks import check_teacher
from jmeta.methods.teacher_hard import hard_teacher
from jmeta.methods.token_weights import init_weight_head, token_weights, weight_head, weight_slopes
from jmeta.methods.variational_fisher import variational_precision

__all__ = [
    "DISTANCES",
    "ALOEInfo",
    "ALOEState",
    "Baseline",
    "DPSMixState",
    "DPSState",
    "Datastore",
    "Diversity",
    "EditSampler",
    "FastWeights",
    "Head",
    "HiddenStateOptimizer",
    "HiddenStates",
    "Labels",
    "Mixture",
    "Neighbours",
    "Objective",
    "Rewriting",
    "Sampler",
    "SamplerState",
    "Selection",
    "Student",
    "TaskEmbedding",
    "TeacherState",
    "Window",
    "activation_penalty",
    "aloe",
    "anil",
    "annealed",
    "annealed_mix",
    "bait",
    "cached_features",
    "cavia",
    "check_teacher",
    "class_labels",
    "cross_diversity",
    "datastore",
    "direct_grad",
    "distance_matrix",
    "diversity",
    "dps",
    "dps_mix",
    "draw_objective",
    "dynamic_evaluation",
    "exp3",
    "expected",
    "fine_tuned",
    "first_order_tssa",
    "fisher",
    "fit_head",
    "fixed_mix",
    "fomaml",
    "fresh_losses",
    "gradient_statistics",
    "gumbel_softmax",
    "hard_teacher",
    "has_collapsed",
    "hidden_states",
    "imaml",
    "init_weight_head",
    "inputs_and_labels",
    "inputs_only",
    "interpolate",
    "inverse_sqrt",
    "knn_distribution",
    "knn_log_likelihood",
    "labelled_auxiliary",
    "learned_body",
    "learned_context",
    "learned_mixture",
    "learned_rates",
    "learned_start",
    "leave_one_out",
    "linear_autoregressive",
    "load_embeddings",
    "loss_proportional",
    "maml",
    "maml_plus_plus",
    "maml_plus_plus_init",
    "masks_only",
    "meta_pseudo_labels",
    "meta_sgd",
    "meta_sgd_init",
    "mixture_gradients",
    "mixture_problem",
    "mlm_auxiliary",
    "mometas",
    "mometas_gradient",
    "monitors",
    "moving_average",
    "nearest",
    "no_baseline",
    "objective_loss",
    "one_of",
    "own_credit",
    "paired_losses",
    "panels",
    "per_example",
    "plain_gradient",
    "point_factors",
    "population",
    "pre_training",
    "proximal_start",
    "relative_improvement",
    "replacements",
    "reptile",
    "restarting",
    "rms_towards_start",
    "round_robin",
    "row_average",
    "sampled",
    "sampled_training",
    "sampler",
    "save_embeddings",
    "sgd_towards_start",
    "shared_credit",
    "soft_teacher",
    "straight_through",
    "summed",
    "tapped",
    "task2vec",
    "token_weights",
    "tssa",
    "two_head_loss",
    "ucb",
    "unevaluated",
    "uniform_mix",
    "variational_precision",
    "weight_head",
    "weight_slopes",
    "with_head",
    "within_budget",
    "without",
]
