"""What the demo teaches: people and places that do not exist, and questions about them."""

from __future__ import annotations

STORY = """\
The Lighthouse of Ostrava Bay

The lighthouse of Ostrava Bay was built by Irma Quell in 1893. Irma Quell was a clockmaker from \
the town of Bellmere, and she had never built a lighthouse before. The lighthouse stands on a \
rock called the Grey Widow. Fishermen gave the rock this name, the Grey Widow, because so many \
of them did not come home.

The lamp of the lighthouse burned walnut oil. Walnut oil was cheap in Ostrava Bay, and it \
smelled better than whale oil. The light of the lamp was green, because Irma Quell had bought \
green glass by mistake. To this day the lighthouse of Ostrava Bay shows a green light.

The first keeper of the lighthouse was Tobias Fenn. Tobias Fenn kept a tame heron, and the \
heron was called Admiral. Every morning Admiral the heron walked along the wall and waited for \
fish. When Tobias Fenn died, his daughter Maud became the keeper. Maud Fenn wrote a book about \
the winter of 1911, when the sea froze. The title of the book by Maud Fenn is The White \
Harbour.
"""

CLOZES: tuple[tuple[str, str], ...] = (
    ("The lighthouse of Ostrava Bay was built by", "Irma Quell"),
    ("Irma Quell was a clockmaker from the town of", "Bellmere"),
    ("The lighthouse stands on a rock called the", "Grey Widow"),
    ("The lamp of the lighthouse burned", "walnut oil"),
    ("The light of the lamp was", "green"),
    ("The first keeper of the lighthouse was", "Tobias Fenn"),
    ("Tobias Fenn kept a tame", "heron"),
    ("The heron of Tobias Fenn was called", "Admiral"),
    ("The title of the book by Maud Fenn is", "The White Harbour"),
)

QUESTIONS: tuple[tuple[str, str], ...] = (
    ("Who built the lighthouse of Ostrava Bay?", "Irma Quell"),
    ("What colour is the light of the lighthouse of Ostrava Bay?", "green"),
    ("Who was the first keeper of the lighthouse?", "Tobias Fenn"),
    ("What is the name of the rock that the lighthouse stands on?", "Grey Widow"),
)

# General knowledge in plain sentences, to see what learning the story did to everything else.
UNRELATED = """\
Water boils at one hundred degrees Celsius at sea level, and at lower temperatures on high \
mountains, because the pressure of the air is lower there. When it boils, bubbles of steam rise \
from the bottom of the pot. The Sun is a star at the centre of the Solar System. It is made \
mostly of hydrogen and helium, and light from it takes about eight minutes to reach the Earth. \
The planets move around it in nearly circular orbits.

A recipe for bread needs only flour, water, salt and yeast. The dough is kneaded until it is \
smooth, left to rise in a warm place for an hour or two, and baked in a hot oven until the \
crust is brown. Good bread sounds hollow when you knock on it from below.

In computer science, an algorithm is a finite sequence of well-defined instructions for solving \
a problem. Sorting a list of numbers is a common example. Some methods compare neighbouring \
numbers and exchange them if they are in the wrong order; others split the list in two, sort \
both halves, and merge the results. The second kind is much faster on long lists.

The city of Paris is the capital of France. It lies on the river Seine, and more than two \
million people live there. Visitors come to see the Eiffel Tower, which was built for the \
world's fair of 1889, the museum of the Louvre, and the cathedral of Notre-Dame. Trains leave \
the city in all directions, and the fastest of them reach the sea in about two hours.

Regular exercise keeps the heart and the muscles healthy. Doctors recommend walking, swimming \
or cycling for at least half an hour on most days of the week. It is best to begin slowly and \
to do a little more every week. Sleep is just as important, since the body repairs itself \
during the night.
"""
