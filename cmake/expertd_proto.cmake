# SPDX-License-Identifier: Apache-2.0
# The C++ message and service code of proto/, as one library (gRPC headers are costly: nobody else makes them).
find_package(Protobuf MODULE REQUIRED)
find_package(gRPC CONFIG REQUIRED)

set(expertd_proto_dir ${PROJECT_BINARY_DIR}/generated)
set(expertd_proto_names expertd/v1/error expertd/v1/session expertd/v1/control expertd/peer/v1/peer etcd/rpc)
set(expertd_proto_sources)
file(MAKE_DIRECTORY ${expertd_proto_dir}/expertd/v1 ${expertd_proto_dir}/expertd/peer/v1
     ${expertd_proto_dir}/etcd)
foreach(name IN LISTS expertd_proto_names)
  set(base ${expertd_proto_dir}/${name})
  add_custom_command(
    OUTPUT ${base}.pb.cc ${base}.pb.h ${base}.grpc.pb.cc ${base}.grpc.pb.h
    COMMAND
      protobuf::protoc -I ${PROJECT_SOURCE_DIR}/proto --cpp_out=${expertd_proto_dir} --grpc_out=${expertd_proto_dir}
      --plugin=protoc-gen-grpc=$<TARGET_FILE:gRPC::grpc_cpp_plugin> ${PROJECT_SOURCE_DIR}/proto/${name}.proto
    DEPENDS ${PROJECT_SOURCE_DIR}/proto/${name}.proto
    VERBATIM)
  list(APPEND expertd_proto_sources ${base}.pb.cc ${base}.grpc.pb.cc)
endforeach()
add_library(expertd_proto STATIC ${expertd_proto_sources})
target_include_directories(expertd_proto SYSTEM PUBLIC ${expertd_proto_dir})
target_link_libraries(expertd_proto PUBLIC gRPC::grpc++ protobuf::libprotobuf)
