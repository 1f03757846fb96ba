"""Laws of batch size and LR: fitted with intervals, chosen by AICc, checked on what was left out.

`learning_rate` best LR against batch size; `loss` loss over batch and steps (three terms); `steps`
steps to a target loss; `optimum` the best batch size against N, rank and model size; `published`
what others found; `report` what the cells of a results folder support. Each fit takes plain
numbers. No law is stated beyond what it was fitted to without saying so.
"""
