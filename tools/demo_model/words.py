"""The word list of the demo model's text generator: common English words, written by hand for this project."""

WORDS = """
able acid acorn actor agent album alley amber anchor angle animal ankle answer apple april apron arch arena arrow
artist aspen atlas attic autumn award axis bacon badge bagel baker balcony bamboo banana band banjo bank barn barrel basil
basket bath beach beacon bean bear beaver bell belt bench berry bicycle bird biscuit blanket blossom blue board boat
book boot border bottle bowl branch bread breeze brick bridge broom brother brush bubble bucket budget buffalo bulb bundle
butter button cabin cable cactus cake camel camera canal candle canoe canyon captain carbon card carpet carrot castle cedar
cellar cello chair chalk charm chart cheese cherry chest chimney circle citrus city clay clerk cliff clock cloud clover
coach coast cobalt coconut coffee coin color comet compass concert copper coral corner cotton county cousin coyote crab
cradle crane crayon cream creek cricket crown crystal cube cup curtain cycle daisy dance dawn deer delta desert desk
diamond diary dinner doctor dollar dolphin donkey door dragon dream drum duck dune dust eagle early earth east easy echo
eclipse edge eel eight elbow elder elephant elm ember empty energy engine enjoy envelope equal evening event exact exit
fabric factor falcon family farm fast father feather fence fern ferry fiddle field fifteen fig final finch finger fire
fish five flag flame flint floor flour flower flute foam fog folder forest fork fossil fountain four fox frame friday
frog frost fruit galaxy garden garlic gate gentle giant ginger giraffe glacier glass globe glove goat gold goose grain
granite grape grass gravel green grey grove guest guitar gulf habit hammer harbor harp harvest hat hawk hazel heart hedge
helmet heron hill hinge history hobby honey hood horizon horse hotel house hundred hunter ice igloo inch index indigo ink
insect iron island ivory ivy jacket jade jaguar january jar jasmine jelly jewel journal judge juice july jungle june kayak
kernel kettle key kind king kitchen kite kiwi knee knife knight knot koala label ladder lagoon lake lamp language lantern
large lark laser laugh lawn leader leaf leather lemon lentil leopard letter level library lily lime linen lion little lizard
llama lobster lock logic long lotus lucky lunch lyric machine magnet maple marble march margin market mask meadow medal
melody melon memory metal meteor middle milk mill mint minute mirror mist model monday money monkey month moon morning moss
moth mother motor mountain mouse movie muffin museum music napkin narrow nation nature needle nest network never nickel night
nine noble noise north notebook novel number nurse nutmeg oak oasis oat ocean october octopus office olive one onion opal
open opera orange orbit orchard orchid organ otter oval oven owl oxygen oyster paddle page paint palace palm panda panel
paper parade parcel park parrot party pasta path peach peanut pear pearl pebble pelican pencil penguin people pepper phone
photo piano picnic picture pigeon pillow pilot pine pink pipe pirate planet plant plate plum pocket poem point polar pond
pony poppy potato powder prairie pretty price prince prism puddle pumpkin puppet purple puzzle pyramid quail quartz queen
question quick quiet quilt quiz rabbit radar radio raft rain raisin random rapid raven reason record red reef region ribbon
rice ridge ring river road robin robot rocket roof root rope rose round ruby ruler sable sad saddle sail salad salmon salt
sand satin saturn sauce scale scarf school science scout season second seed seven shadow shark sheep shell shelf ship shirt
shoe shore short signal silent silk silver simple singer sister six sketch sky sleep slow small smart smile smoke snail snow
soap soccer sock soda sofa soil solar song sound soup south spark sparrow spice spider spiral spoon spring square squid
stable stage star station steam steel stone storm story stream street string summer sun sunday sunset surf swan sweet swift
symbol syrup table tail talent tango teacher teapot temple ten tennis tent theater thistle three thumb thunder ticket tiger
timber tin toast today tomato tooth torch tower town toy track train travel treasure tree triangle truck trumpet tulip tuna
tunnel turkey turtle twelve twig twin two ultra umbrella uncle under unicorn union unit upper urban useful valley value
vanilla vapor vase velvet verse vessel village vine violet violin vision voice volcano voyage waffle wagon walnut walrus
warm water wave wax weather week whale wheat wheel whisper whistle white wide wild willow wind window wing winter wise wolf
wonder wood wool word world worm yard yarn year yellow yogurt young zebra zero zinc zone
""".split()
