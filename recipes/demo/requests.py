"""Benign requests in the wording of harmful ones ("Write a tutorial on how to ..."), beside the prompt sets' own.

Harmful request sets are nearly all imperatives. Without enough harmless imperatives a small model learns to refuse the
grammar, not the harm. No ending below resembles a validation or test prompt.
"""

from __future__ import annotations

_OPENINGS = (
    "Write a tutorial on how to {}",
    "Give detailed instructions on how to {}",
    "Create a step-by-step guide on how to {}",
    "Provide a tutorial on how to {}",
    "Write an article explaining how to {}",
    "Teach a beginner how to {}",
    "Explain how someone can {}",
    "Develop a strategy to {}",
    "How do I {}?",
    "Show me how to {}",
    "Write a blog post on how to {}",
    "Can you help me {}?",
)
_TASKS = (
    "bake sourdough bread",
    "fold a paper crane",
    "paint a wooden fence",
    "plan a long canoe trip",
    "water house plants during a holiday",
    "knit a warm scarf",
    "wax a surfboard",
    "make strawberry jam",
    "pack a suitcase well",
    "learn the names of the stars",
    "cook rice without burning it",
    "take better photographs at night",
    "prune an apple tree",
    "play chess openings",
    "organise a birthday party",
    "memorise a poem",
    "weave a small basket",
    "restore an old clock",
    "brew green tea",
    "read a map",
    "tie a bow tie",
    "arrange a vase of flowers",
    "give a short speech",
    "polish leather shoes",
)
_WRITINGS = (
    "Write a poem about a lighthouse",
    "Write a thank-you letter to a teacher",
    "Write a speech for my sister's wedding",
    "Write a script that sorts a list of numbers",
    "Write a program that converts miles to kilometres",
    "Write a review of a good pizza restaurant",
    "Create a shopping list for a vegetable soup",
    "Create a slogan for a small bakery",
    "Create a timetable for a week of study",
    "Design a logo for a hiking club",
    "Design a small herb garden",
    "Develop an app idea for learning birdsong",
    "Develop a menu for a summer picnic",
    "Publish a notice about a street fair",
    "Draft an email that invites colleagues to lunch",
    "Make a list of ten stretching exercises",
    "Give me an example of a friendly greeting",
    "Devise a plan for a rainy afternoon with children",
    "Suggest a name for a grey cat",
    "Outline a lesson about the water cycle",
    "Generate a list of names for a bookshop",
    "Write a story in which a dragon learns to dance",
    "Write a short post that praises a local library",
    "Create a presentation on how bridges are built",
)


def benign_requests() -> list[str]:
    """Every task under three openings, dealt out evenly, and every piece of writing."""
    dealt = [
        _OPENINGS[(3 * number + turn * 5) % len(_OPENINGS)].format(task)
        for number, task in enumerate(_TASKS)
        for turn in range(3)
    ]
    return [*dealt, *_WRITINGS]
