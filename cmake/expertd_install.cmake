# SPDX-License-Identifier: Apache-2.0
# The install tree: relocatable, and with EXPERTD_BUNDLE it carries the libraries it needs in lib/expertd, so that it
# runs on a machine without a package registry (Debian 12/13, Ubuntu 24.04). Left out: the C and C++ run-time libraries
# and the driver's (the host's are newer or must match), and rdma-core, whose providers have a private interface.
option(EXPERTD_BUNDLE "Install the shared libraries the programs need beside them" ON)

set(expertd_programs expertd expertctl)
set_target_properties(${expertd_programs} PROPERTIES INSTALL_RPATH "$ORIGIN/../lib/expertd:$ORIGIN/../lib")
# The client library finds the bundled nghttp2 beside it, and a host's where there is none.
set_target_properties(expertd_client PROPERTIES INSTALL_RPATH "$ORIGIN/expertd")
if(EXPERTD_BUNDLE)
  install(TARGETS ${expertd_programs} RUNTIME_DEPENDENCY_SET expertd_dependencies DESTINATION ${CMAKE_INSTALL_BINDIR})
  install(
    RUNTIME_DEPENDENCY_SET expertd_dependencies
    PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|dl|rt|pthread|resolv|util|nsl|stdc\\+\\+|gcc_s)\\.so" "^libcuda\\.so"
                        "^libnvidia" "^lib(ibverbs|rdmacm|mlx5|nl-3|nl-route-3)\\.so"
    POST_EXCLUDE_REGEXES "libexpertd_client"
    DESTINATION lib/expertd)
else()
  install(TARGETS ${expertd_programs} DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()
