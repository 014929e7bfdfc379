"""What the page says about each method, for a reader who meets it for the first time.

`{label}` is the answer that is explained, `{this}` what is looked at, and `{bright}`
how places look that matter, where none can speak against the answer.
"""

TITLES = {
    "grad_cam": "Grad-CAM",
    "grad_cam++": "Grad-CAM++",
    "occlusion": "Occlusion",
    "integrated_gradients": "Integrated gradients",
    "smooth_grad": "SmoothGrad",
    "guided_backprop": "Guided backprop",
}

# All that --methods takes: attributions, and the other parts of the page.
METHODS = (
    *TITLES,
    "nearest",
    "feature_maps",
    "filters",
    "receptive_field",
    "optimized",
)

QUESTIONS = {
    "grad_cam": "Which region speaks for “{label}”? {bright} places do. The map is as"
    " coarse as the layer it comes from.",
    "grad_cam++": "The same question, weighted so that several objects, or several"
    " parts of one, all count.",
    "occlusion": "What if a part were covered? Red: without this place “{label}” loses"
    " ground. Blue: it gains, so the place spoke for something else.",
    "integrated_gradients": "How much does each place add to the score of “{label}”, on"
    " the way from an empty input to this {this}? Red adds, blue takes away.",
    "smooth_grad": "Where would a small change matter most? {bright} places. The"
    " gradient is averaged over 32 noisy copies, so that chance is averaged away.",
    "guided_backprop": "Which patterns did the units respond to? It shows what was seen"
    " rather than why it decided: for another answer it would look much the same.",
}

# Filter, detect, condense: what a block of layers does.
STEPS = {
    "convolution": (
        "Filter",
        "Small filters slide over what came before; red is where a filter's pattern is,"
        " blue its opposite.",
    ),
    "activation": (
        "Detect",
        "What is negative becomes nothing: only the pattern itself remains.",
    ),
    "pooling": (
        "Condense",
        "Only the strongest value of each small window is kept: a smaller map of what"
        " was found.",
    ),
}

# What an input is called, by how it is drawn.
THIS = {"picture": "picture", "series": "series", "maps": "input"}
BRIGHT = {"picture": "Bright", "series": "Red", "maps": "Bright"}
