"""The only numbers that tests compare with. Relative unless the name says otherwise; fp32 on the CPU."""

LAYOUT_LOSS = 1e-5  # any TP/PP/DP/SP layout against one rank
LAYOUT_GRAD_NORM = 1e-5
RESHARDED_RESUME = 1e-6  # loss after resuming under another layout, against never having stopped
PACKED_LOSS = 1e-5  # packed sequences against one by one
PACKED_GRADIENT = 1e-5  # of the largest entry, or of the norm: packed and grouped sequences against one by one
OVERFIT_LOSS = 0.05  # absolute
MEMORY_ESTIMATE = 0.01  # of an independent derivation of the same terms
