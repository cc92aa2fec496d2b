"""What the dialogues of `api_dialogues` are about: APIs with typed slots, and ways to speak of them.

Of each list of phrases the last one is held out of training, and so are the APIs in `HELD_OUT`.
"""

import dataclasses

from mobilellm_jax.evaluation.api_values import TYPES


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter.

    Attributes:
      name: in calls.
      type: of `TYPES`.
      phrases: ways to say it behind a request.
      question: what the agent asks where it is missing; an optional slot has none.
    """

    name: str
    type: str
    phrases: tuple[str, ...]
    question: str = ""


@dataclasses.dataclass(frozen=True)
class Api:
    """A function that the parser may call.

    Attributes:
      name: in calls.
      requests: ways to ask for it, before the phrases of its slots.
      done: what the agent says it has done, before the phrases of the slots.
      slots: its parameters, in the order of its signature.
    """

    name: str
    requests: tuple[str, ...]
    done: str
    slots: tuple[Slot, ...]

    @property
    def signature(self) -> str:
        """Name, slots and their types, and which may be missing, as the system message shows them."""
        slots = (
            f"{slot.name}: {TYPES[slot.type][0]}{'' if slot.question else ' = None'}"
            for slot in self.slots
        )
        return f"{self.name}({', '.join(slots)})"


_DAY = Slot("day", "day", ("on {}", "this coming {}", "and I mean {}"))
_TO = ("to {}", "for {}", "and the one who gets it is {}")

APIS = (
    Api(
        "set_alarm",
        ("Set an alarm", "Please make an alarm", "I need an alarm", "Get me out of bed"),
        "your alarm is set",
        (
            Slot("time", "time", ("for {}", "at {}", "that rings at {}"), "What time is it for?"),
            Slot("label", "topic", ("called {}", "with the label {}", "to think of {}")),
        ),
    ),
    Api(
        "start_timer",
        ("Start a timer", "Set a timer", "Can you run a timer", "Begin a countdown"),
        "the timer is running",
        (
            Slot(
                "minutes", "minutes", ("for {}", "of {}", "lasting {}"), "How long should it run?"
            ),
            Slot("label", "food", ("for the {}", "named {}", "because I am making {}")),
        ),
    ),
    Api(
        "send_message",
        ("Send a message", "Can you text", "Please write a message", "Drop a line"),
        "the message is sent",
        (
            Slot("contact", "person", _TO, "Who should get it?"),
            Slot(
                "text",
                "message",
                ("saying {}", "that reads {}", "with the words {}"),
                "What is it?",
            ),
        ),
    ),
    Api(
        "style_transfer",
        ("Rewrite this", "Help me word this", "Put this in another way", "Polish this"),
        "here is your text rewritten",
        (
            Slot("text", "message", (": {}", "please: {}", ", I mean {}"), "Which text?"),
            Slot("style", "style", ("as {}", "in the style of {}", "so it sounds like {}")),
            Slot("contact", "person", _TO),
        ),
    ),
    Api(
        "call_contact",
        ("Make a call", "Place a phone call", "I want to phone", "Ring somebody up, I mean a call"),
        "I am calling",
        (
            Slot(
                "contact", "person", ("to {}", "with {}", "that reaches {}"), "Whom shall I call?"
            ),
            Slot("video", "switch", ("with video {}", "and video {}", "keeping video {}")),
        ),
    ),
    Api(
        "add_event",
        ("Add an event", "Put something in my calendar", "Schedule something", "Block some time"),
        "it is in your calendar",
        (
            Slot("title", "topic", ("about {}", "called {}", "because of {}"), "What is it about?"),
            Slot("day", "day", ("on {}", "for {}", "when it is {}"), "On which day?"),
            Slot("time", "time", ("at {}", "starting at {}", "from {} onwards")),
        ),
    ),
    Api(
        "get_weather",
        (
            "What is the weather",
            "Tell me the weather",
            "Show the forecast",
            "Do I need an umbrella",
        ),
        "I looked up the weather",
        (Slot("city", "city", ("in {}", "for {}", "over in {}"), "In which city?"), _DAY),
    ),
    Api(
        "play_music",
        ("Play some music", "Put on a playlist", "I want to listen to music", "Let me hear a tune"),
        "the music is playing",
        (
            Slot(
                "genre", "music", ("like {}", "and make it {}", "in the manner of {}"), "What kind?"
            ),
            Slot("volume", "percent", ("at {} volume", "with volume {}", "no louder than {}")),
            Slot("minutes", "minutes", ("for {}", "during {}", "stopping after {}")),
        ),
    ),
    Api(
        "translate",
        ("Translate something", "I need a translation", "Can you translate", "Say this abroad"),
        "here is the translation",
        (
            Slot("text", "message", (": {}", "of {}", ", namely {}"), "What shall I translate?"),
            Slot("language", "language", ("into {}", "to {}", "as they say in {}"), "To what?"),
        ),
    ),
    Api(
        "set_device",
        ("Switch something", "Please turn something", "Change a device", "Flip a switch"),
        "it is done",
        (
            Slot("device", "device", (", namely {}", "for me, {}", "that belongs to {}"), "Which?"),
            Slot("on", "switch", ("to {}", "so that it is {}", "until it is {}"), "On or off?"),
            Slot("time", "time", ("at {}", "when it is {}", "not before {}")),
        ),
    ),
    Api(
        "set_temperature",
        ("Set the temperature", "Change the thermostat", "Adjust the heating", "Make it cosy"),
        "the temperature is changed",
        (
            Slot("degrees", "degrees", ("to {}", "at {}", "as in {}"), "How warm should it be?"),
            Slot("minutes", "minutes", ("for {}", "for the next {}", "but only for {}")),
        ),
    ),
    Api(
        "add_to_list",
        (
            "Add to my shopping list",
            "Put on the shopping list",
            "We need",
            "We have run out, so get",
        ),
        "your list is longer now",
        (Slot("items", "items", (": {}", "these: {}", "the following: {}"), "What do you need?"),),
    ),
    Api(
        "order_food",
        ("Order food", "I want to order something", "Get a delivery", "I am hungry, so order"),
        "your order is placed",
        (
            Slot(
                "dish", "food", (", I think {}", "like {}", "along the lines of {}"), "What dish?"
            ),
            Slot("people", "people", ("for {}", "enough for {}", "that feeds {}"), "How many eat?"),
            Slot("time", "time", ("at {}", "to come at {}", "delivered by {}")),
        ),
    ),
    Api(
        "book_ride",
        ("Book a ride", "Get me a taxi", "I need a car", "Have somebody drive me"),
        "your ride is booked",
        (
            Slot("city", "city", ("to {}", "going to {}", "in the direction of {}"), "Where to?"),
            Slot("people", "people", ("for {}", "with seats for {}", "that holds {}")),
            Slot("time", "time", ("at {}", "leaving at {}", "around {}"), "When do you leave?"),
        ),
    ),
    Api(
        "find_places",
        ("Find places", "Search the map", "Look for something", "Where can I go"),
        "I found some",
        (
            Slot("kind", "kind", ("like {}", "for {}", "such as {}"), "What are you looking for?"),
            Slot("city", "city", ("in {}", "around {}", "not far from {}")),
        ),
    ),
    Api(
        "send_money",
        ("Send money", "Transfer money", "Make a payment", "Settle a debt"),
        "the money is on its way",
        (
            Slot("amount", "amount", (", {}", "of {}", "worth {}"), "How much?"),
            Slot("contact", "person", _TO, "To whom?"),
            Slot("reason", "topic", ("because of {}", "as my share of {}", "to cover {}")),
        ),
    ),
    Api(
        "set_brightness",
        ("Set the brightness", "Change the screen brightness", "Dim the screen", "Mind my eyes"),
        "the screen is adjusted",
        (Slot("percent", "percent", ("to {}", "at {}", "down or up to {}"), "How bright?"),),
    ),
    Api(
        "create_note",
        ("Make a note", "Write this down", "Take a note", "Keep this in mind"),
        "I have noted it",
        (
            Slot(
                "text", "message", (": {}", "that says {}", "as follows: {}"), "What shall I note?"
            ),
            Slot("topic", "topic", ("about {}", "under {}", "filed with {}")),
        ),
    ),
)
HELD_OUT = (
    Api(
        "log_workout",
        ("Log a workout", "Record my training", "I have exercised", "Write up my sport"),
        "your workout is recorded",
        (
            Slot("sport", "sport", (", it was {}", "of {}", "and that was {}"), "Which sport?"),
            Slot("minutes", "minutes", ("for {}", "that took {}", "over {}"), "For how long?"),
            Slot("day", "day", ("on {}", "from {}", "dated {}")),
        ),
    ),
    Api(
        "reserve_table",
        ("Reserve a table", "Book a restaurant", "I want to eat out", "Get us seats for dinner"),
        "your table is reserved",
        (
            Slot("people", "people", ("for {}", "with room for {}", "where {} fit"), "How many?"),
            Slot("time", "time", ("at {}", "starting at {}", "towards {}"), "At what time?"),
            _DAY,
        ),
    ),
    Api(
        "watch_price",
        ("Watch a price", "Track a price", "Keep an eye on a price", "Alert me to a bargain"),
        "I will watch the price",
        (
            Slot("commodity", "stock", ("of {}", "for {}", "when it comes to {}"), "Of what?"),
            Slot("below", "amount", ("below {}", "until it is under {}", "cheaper than {}")),
        ),
    ),
    Api(
        "learn_words",
        ("Teach me words", "Start a vocabulary lesson", "Quiz me", "Train my memory"),
        "the lesson begins",
        (
            Slot("language", "language", ("in {}", "from {}", "spoken as {}"), "Which language?"),
            Slot("count", "count", (", {} of them", "with {} words", "{} in number")),
        ),
    ),
    Api(
        "share_location",
        ("Share my location", "Show where I am", "Send my position", "Let somebody follow me"),
        "your location is shared",
        (
            Slot("contact", "person", ("with {}", "to {}", "so that it reaches {}"), "With whom?"),
            Slot("minutes", "minutes", ("for {}", "during {}", "ending after {}")),
        ),
    ),
    Api(
        "block_apps",
        ("Block distractions", "Turn on focus mode", "Keep me focused", "No disturbances, please"),
        "distractions are blocked",
        (
            Slot("minutes", "minutes", ("for {}", "during {}", "throughout {}"), "For how long?"),
            Slot("exception", "person", ("except for {}", "but not {}", "though never {}")),
        ),
    ),
)
OPENINGS = ("", "Hi! ", "Hello. ", "Hey there. ")
CONFIRMATIONS = ("Done: {}.", "Sure, {}.", "All right, {}.", "With pleasure, {}.")
CORRECTIONS = (
    "Sorry, change that: {}.",
    "Wait, make it {} instead.",
    "I was wrong, it should be {}.",
    "On second thoughts, go with {}.",
)
THANKS = ("Thank you!", "Thanks, that is all.", "Great, thanks.", "Much obliged.")
FAREWELLS = ("You are welcome!", "Happy to help!", "Any time!", "My pleasure!")
