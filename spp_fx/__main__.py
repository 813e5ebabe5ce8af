from spp_fx.cli import main

main()
