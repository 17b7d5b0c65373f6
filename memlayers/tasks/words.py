"""The words and sentences that the generated tasks are made of, all written for this project.

Nothing here holds a digit, a hyphen or a UUID, so no answer of any kind can occur in the noise sentences.
"""

from __future__ import annotations

NOISE_SENTENCES = (
    "Rain falls on the old roof.",
    "A boat waits in the harbour.",
    "The baker opens his door early.",
    "Two crows sit on the fence.",
    "The train leaves without a sound.",
    "Her lamp burns until morning.",
    "Moss grows on the north wall.",
    "The river bends at the mill.",
    "He folds the letter again.",
    "Snow covers the quiet road.",
    "The clock in the hall has stopped.",
    "Children run across the square.",
    "A cat sleeps on the warm stone.",
    "The wind turns the sails.",
    "They carry water up the hill.",
    "The market closes at noon.",
    "Smoke rises from the far farm.",
    "A dog follows the cart home.",
    "The sea is calm this evening.",
    "Someone plays a slow tune.",
    "The garden smells of mint.",
    "Bread cools on the table.",
    "The path goes round the lake.",
    "Stars come out one by one.",
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ample ancient autumn bitter bold brave brief bright brisk broad bronze calm careful cheerful clear
    clever coastal cobalt copper coral cosy crimson crisp curious dapper deep distant dusty eager early
    earnest eastern ebony elder faint fair faithful fancy fearless fertile fierce floral fluent fond formal
    fragile frank fresh frosty gentle giant gilded glad glossy golden graceful grand grateful green hardy
    hasty hazel hearty hidden hollow honest humble icy idle inland ivory jolly joyful keen kind lavish
    lively lonely lucky lunar mellow merry mighty mild misty modest narrow neat nimble noble northern olive
    orderly pale patient peaceful placid plain plucky polite proud quick quiet rapid rare regal remote
    restless robust rosy rugged rural rustic scarlet serene shady sharp shy silent silver sincere sleepy
    slender smooth snowy solar solemn solid southern spare spotless steady stern stout strong subtle sunny
    supple swift tall tame tender thrifty tidy timid tranquil upright urban velvet vivid wary western wild
    windy wise witty wooden woolly young zealous
    """
)

NOUNS = _words(
    """
    acorn anchor anvil apron arrow badger banner barley barrel basket beacon beaver bellows bench birch
    blanket bonnet bottle bramble bridge bucket buckle button cabin candle canyon carpet castle cedar cellar
    chapel cherry chimney cider clover cobbler comet compass cottage cradle cricket crystal curtain daisy
    dagger desert dolphin donkey drawer eagle ember engine falcon feather fiddle finch flagon flute forest
    fossil fountain gadget garlic garnet geyser ginger glacier goblet granite hammer hamlet harbor harvest
    hatchet hazelnut hedge helmet heron hollow hornet island ivy jacket jasmine jigsaw kettle kitten ladder
    lagoon lantern lemon lentil lizard locket lobster magnet mallet maple marble meadow melon mirror mitten
    monsoon mortar mosaic mustard napkin nettle nutmeg orchard orchid otter oyster paddle parcel parrot
    pebble pencil pepper piano pigeon pillow planet plough pocket poppy prairie pulley pumpkin quarry quilt
    rabbit radish ribbon river rocket rudder saddle saffron satchel seagull shovel shutter sickle spindle
    sparrow spruce squirrel stable statue stirrup sundial tavern teapot thicket thimble thistle timber
    trellis trumpet tulip tunnel turnip turtle valley violet violin wagon walnut walrus willow window winter
    yarrow zephyr
    """
)
